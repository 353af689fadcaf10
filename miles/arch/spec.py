"""What a model is, as frozen data: everything that needs to know an architecture reads these classes.

All sizes are counts (heads, experts, layers) or widths in elements. Nothing here loads weights or torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

Dtype = Literal["fp32", "bf16", "fp16"]
QkNormOver = Literal["head", "width"]
Scoring = Literal["softmax", "sigmoid"]
Activation = Literal["silu", "gelu_tanh"]
"""Of the gate: SwiGLU, or GeGLU with tanh in place of the error function."""


@dataclass(frozen=True)
class Llama3Scaling:
    """Longer contexts by slower rotation: frequencies of wavelengths beyond `original_positions /
    low_freq_factor` are divided by `factor`, those below `original_positions / high_freq_factor` stay, and
    those between are interpolated (Llama 3.1, https://arxiv.org/abs/2407.21783).
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True)
class LinearScaling:
    """Longer contexts by slower rotation: every frequency is divided by `factor`
    (https://arxiv.org/abs/2306.15595).
    """

    factor: float


@dataclass(frozen=True)
class YarnScaling:
    """Longer contexts by slower rotation: pairs that turn less than `slow_turns` times within
    `original_positions` are slowed by `factor`, those that turn more than `fast_turns` times are not, with a
    ramp between (https://arxiv.org/abs/2309.00071). `mscale`, `mscale_all_dim`: by how much scores grow with
    log(factor), on rotated pairs and on all; 0: not given.
    """

    factor: float
    original_positions: int
    fast_turns: float = 32.0
    slow_turns: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    @property
    def magnitude(self) -> float:
        """What rotated pairs are multiplied with."""
        if self.mscale and self.mscale_all_dim:
            return self._growth(self.mscale) / self._growth(self.mscale_all_dim)
        return self._growth(1.0)

    @property
    def score_growth(self) -> float:
        """What the scale of all scores is multiplied with."""
        return self._growth(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _growth(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (https://arxiv.org/abs/2104.09864)."""

    theta: float
    scaling: Llama3Scaling | LinearScaling | YarnScaling | None = None
    width: int | None = None
    """Elements at the start of a head that are rotated; None: all."""
    interleaved: bool = False
    """Whether published weights rotate elements 2 i and 2 i + 1 together; otherwise i and i + width / 2."""


@dataclass(frozen=True)
class LatentSpec:
    """Multi-head latent attention: queries, keys and values of all heads are projections of low rank
    (https://arxiv.org/abs/2405.04434, section 2.1). A head's query and key have `plain_dim` elements of its
    own and `rotated_dim` rotated ones, whose key all heads share.
    """

    query_rank: int | None
    """None: queries are projected from the hidden state at once."""
    kv_rank: int
    plain_dim: int
    rotated_dim: int
    value_dim: int

    @property
    def query_dim(self) -> int:
        return self.plain_dim + self.rotated_dim

    @property
    def down_widths(self) -> tuple[int, int, int]:
        """Rows of the fused projection from the hidden state: query, key and value, rotated key. With a
        query rank of None the first is 0."""
        return self.query_rank or 0, self.kv_rank, self.rotated_dim


@dataclass(frozen=True)
class IndexerSpec:
    """Sparse attention: a query sees the `top_k` keys that score highest with a small attention of its own,
    sum over heads of weight * relu(q k) (https://arxiv.org/abs/2512.02556, section 2.1). It gets no gradient.
    """

    num_heads: int
    head_dim: int
    top_k: int

    def num_parameters(self, hidden_size: int, query_rank: int) -> int:
        projections = self.num_heads * self.head_dim * query_rank + self.head_dim * hidden_size
        return projections + self.num_heads * hidden_size + 2 * self.head_dim


@dataclass(frozen=True)
class QueryTemperature:
    """Sharper attention far behind: the query at position p is multiplied by
    1 + scale · log(1 + floor((p + 1) / floor)) (https://arxiv.org/abs/2501.19399).
    """

    scale: float
    floor: float


@dataclass(frozen=True)
class AttentionSpec:
    """Grouped-query attention. `qk_norm`: RMSNorm over queries and keys before the rotation.

    A token sees itself and all before it; `window`: itself and the `window` - 1 tokens before it; `chunk`:
    those before it in its own chunk of so many positions.
    `softcap`: scores s become softcap · tanh(s / softcap) (https://arxiv.org/abs/2408.00118).

    With `latent`, this is the attention over latents: one key head, the latent followed by the rotated key,
    whose values are the keys (queries absorb the projection from latent to keys, outputs that to values).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool = True
    qk_norm_over: QkNormOver = "head"
    """What shares one mean square: each head, or all heads of a token together."""
    scale: float | None = None
    """Factor of the scores; None: head_dim ** -0.5."""
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    rotates: bool = True
    """False: no position embedding (NoPE); `rope` is not used."""
    qk_unit: bool = False
    """Queries and keys are divided by their root mean square, behind the rotation."""
    v_unit: bool = False
    """Values are divided by their root mean square."""
    keys_of: int | None = None
    """The layer whose keys and values this one attends to; None: it has its own."""
    temperature: QueryTemperature | None = None
    """Of a layer that does not rotate."""
    latent: LatentSpec | None = None
    indexer: IndexerSpec | None = None
    """Keys of the indexer stand behind the others in a row of the cache."""

    @property
    def cache_dim(self) -> int:
        """Elements of a key head in the cache."""
        return self.head_dim + (self.indexer.head_dim if self.indexer else 0)

    @property
    def cache_width(self) -> int:
        """Numbers that the cache holds of a token."""
        return self.num_kv_heads * self.cache_dim * (1 if self.latent else 2)

    @property
    def kept_width(self) -> int:
        """Numbers of a token that backward keeps: projections, and what attention gives."""
        if self.latent is None:
            return self.qkv_width + self.query_width
        projected = sum(self.latent.down_widths) + self.num_heads * self.latent.query_dim
        return projected + 2 * self.query_width + self.kv_width + self.num_heads * self.latent.value_dim

    @property
    def rotary_width(self) -> int:
        """Elements of a head that are rotated."""
        return self.rope.width or self.head_dim

    @property
    def q_norm_width(self) -> int:
        """Weights of the query norm."""
        return self.head_dim if self.qk_norm_over == "head" else self.query_width

    @property
    def k_norm_width(self) -> int:
        """Weights of the key norm; 0 where there are no keys of its own."""
        if self.keys_of is not None:
            return 0
        return self.head_dim if self.qk_norm_over == "head" else self.kv_width

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """What says how far back a token sees: window and chunk; two of None: all the way."""
        return self.window, self.chunk

    @property
    def is_plain(self) -> bool:
        """Whether every token sees all before it, by scores as they are."""
        return self.extent == (None, None) and self.indexer is None and self.softcap is None

    @property
    def query_factor(self) -> float:
        """What queries are multiplied with, beside head_dim ** -0.5."""
        return 1.0 if self.scale is None else self.scale * self.head_dim**0.5

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        """Rows of the fused query, key and value projection."""
        return self.query_width + 2 * self.own_kv_heads * self.head_dim

    @property
    def own_kv_heads(self) -> int:
        """Key heads that the layer computes."""
        return 0 if self.keys_of is not None else self.num_kv_heads

    def query_parameters(self, hidden_size: int) -> int:
        """Matrices of queries and output."""
        latent = self.latent
        if latent is None:
            return 2 * self.query_width * hidden_size
        rank, width = latent.query_rank, self.num_heads * latent.query_dim
        queries = width * hidden_size if rank is None else rank * (hidden_size + width)
        return queries + self.num_heads * latent.value_dim * hidden_size

    def key_value_parameters(self, hidden_size: int) -> int:
        """Matrices of keys and values."""
        latent = self.latent
        if latent is None:
            return 2 * self.own_kv_heads * self.head_dim * hidden_size
        up = self.num_heads * (latent.plain_dim + latent.value_dim) * latent.kv_rank
        return (latent.kv_rank + latent.rotated_dim) * hidden_size + up

    def num_parameters(self, hidden_size: int) -> int:
        projections = self.query_parameters(hidden_size) + self.key_value_parameters(hidden_size)
        if self.latent is not None:
            rank = self.latent.query_rank or 0
            indexer = self.indexer.num_parameters(hidden_size, rank) if self.indexer else 0
            return projections + rank + self.latent.kv_rank + indexer
        biases = self.qkv_bias * self.qkv_width + self.output_bias * hidden_size
        return projections + biases + self.qk_norm * (self.q_norm_width + self.k_norm_width)


@dataclass(frozen=True)
class DenseMlpSpec:
    """A gated block: down(activation(gate(x)) * up(x)), no biases (https://arxiv.org/abs/2002.05202)."""

    intermediate_size: int
    activation: Activation = "silu"
    sparsity: float = 0.0
    """Share of the gate's elements that are cut to 0, taking them as normally distributed; 0: none. The rest
    is lowered by the cut."""

    def num_parameters(self, hidden_size: int) -> int:
        return 3 * hidden_size * self.intermediate_size

    def num_active_parameters(self, hidden_size: int) -> int:
        return self.num_parameters(hidden_size)


@dataclass(frozen=True)
class MoeSpec:
    """SwiGLU experts behind a router: each token visits `top_k` of `num_experts`, and the shared experts.

    `norm_topk_prob`: the chosen scores are divided by their sum before they weigh the experts.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    norm_topk_prob: bool
    scoring: Scoring = "softmax"
    """From router logits to scores: over all experts, or for each expert alone."""
    correction_bias: bool = False
    """A bias per expert that takes part in the choice, not in the weights, and gets no gradient
    (https://arxiv.org/abs/2408.15664)."""
    scales_inputs: bool = False
    """The weights of the experts multiply what goes into them, not what comes out."""
    stacked: bool = False
    """Published as one tensor of all experts, [experts, inputs, outputs]."""
    num_groups: int = 1
    """Consecutive experts form so many groups; a token chooses among the `top_groups` whose two best experts
    score highest together (https://arxiv.org/abs/2412.19437, section 2.1.2)."""
    top_groups: int = 1
    routed_scaling: float = 1.0
    """What the weights of the experts are multiplied by, after they were normalised."""
    shared_size: int = 0
    """Width of the SwiGLU that every token visits beside its experts: all shared experts as one; 0: none."""

    def num_parameters(self, hidden_size: int) -> int:
        return self._with_experts(self.num_experts, hidden_size)

    def num_active_parameters(self, hidden_size: int) -> int:
        """Parameters one token passes through: the router, `top_k` experts and the shared ones."""
        return self._with_experts(self.top_k, hidden_size)

    def router_parameters(self, hidden_size: int) -> int:
        return self.num_experts * (hidden_size + self.correction_bias)

    def shared_parameters(self, hidden_size: int) -> int:
        return 3 * hidden_size * self.shared_size

    def _with_experts(self, experts: int, hidden_size: int) -> int:
        routed = experts * 3 * hidden_size * self.intermediate_size
        return self.router_parameters(hidden_size) + routed + self.shared_parameters(hidden_size)


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: norm, attention, norm, MLP; both blocks are residual.

    `output_norms`: what a block gives is normed again before it is added.
    """

    attention: AttentionSpec
    mlp: DenseMlpSpec | MoeSpec
    output_norms: bool = False

    @property
    def num_norms(self) -> int:
        """Norms of the model's width."""
        return 4 if self.output_norms else 2


@dataclass(frozen=True)
class StreamsSpec:
    """The residual stream of Gemma 3n (https://ai.google.dev/gemma/docs/gemma-3n): of `count` streams each
    layer computes the first and corrects the others by it (AltUp, https://arxiv.org/abs/2301.13310), beside a
    map of low rank (LAuReL, https://arxiv.org/abs/2411.07501); every layer adds an embedding of its own.
    """

    count: int
    laurel_rank: int
    layer_width: int
    """Elements of a token's embedding for one layer."""
    layer_vocab: int
    """Tokens that have such embeddings; others take those of token 0."""

    def table_parameters(self, num_layers: int) -> int:
        """The embeddings of all layers."""
        return self.layer_vocab * num_layers * self.layer_width

    def num_parameters(self, hidden_size: int, num_layers: int) -> int:
        width, count = self.layer_width, self.count
        outside = num_layers * width * hidden_size + width + 2 * (count - 1) * hidden_size**2
        altup = count**2 + count**3 + (count + 2) * hidden_size
        laurel = (2 * self.laurel_rank + 1) * hidden_size
        added = (2 * width + 1) * hidden_size
        return self.table_parameters(num_layers) + outside + num_layers * (altup + laurel + added)


@dataclass(frozen=True)
class MtpSpec:
    """Multi-token-prediction layers: the layer of depth k predicts token t + 2 + k at row t
    (https://arxiv.org/abs/2412.19437, section 2.2).

    `shared_projection`: all depths share the norms and the projection around their layers (Qwen3-Next);
    otherwise each depth has its own (DeepSeek-V3).
    """

    layers: tuple[LayerSpec, ...]
    shared_projection: bool

    @property
    def num_projections(self) -> int:
        return 1 if self.shared_projection else len(self.layers)

    def num_parameters(self, hidden_size: int) -> int:
        """Embedding and head are the policy's and not counted."""
        projection = 2 * hidden_size * hidden_size + 3 * hidden_size
        return self.num_projections * projection + sum(
            layer.attention.num_parameters(hidden_size)
            + layer.mlp.num_parameters(hidden_size)
            + layer.num_norms * hidden_size
            for layer in self.layers
        )


@dataclass(frozen=True)
class ArchSpec:
    """A decoder-only language model, as its checkpoint's `config.json` describes it."""

    family: str
    """Key of `miles.arch.families.FAMILIES`, e.g. `qwen3_moe`."""
    architecture: str
    """The name under `architectures` in config.json, e.g. `Qwen3MoeForCausalLM`."""
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: Dtype
    """The number format the checkpoint is stored in; fp32 when config.json does not say."""
    initializer_range: float
    """Standard deviation of freshly initialised weights."""
    mtp: MtpSpec | None = None
    """Multi-token-prediction layers beside the model, which they leave as it is."""
    norm_plus_one: bool = False
    """Norms multiply with 1 + weight."""
    embedding_scale: float = 1.0
    """What the embeddings of tokens are multiplied with."""
    logit_softcap: float | None = None
    """Logits z become logit_softcap · tanh(z / logit_softcap)."""
    streams: StreamsSpec | None = None
    root: str = "model"
    """Published name of the module that holds embedding, layers and final norm."""
    other_parts: tuple[str, ...] = ()
    """How names of tensors begin that belong to no part of the decoder (a vision tower): they are carried
    along as they are."""
    value_head: bool = False
    """A head of one row in place of the language model's: a critic. It is never tied."""

    @property
    def embedding_name(self) -> str:
        return f"{self.root}.embed_tokens.weight"

    @property
    def head_name(self) -> str:
        """`lm_head` stands beside the module `model` that `root` ends in, or on top; a critic's head has the
        name that transformers gives that of a sequence classifier.
        """
        if self.value_head:
            return "score.weight"
        outer, _, last = self.root.rpartition(".")
        return f"{outer}.lm_head.weight" if outer and last == "model" else "lm_head.weight"

    @property
    def head_rows(self) -> int:
        """What the head gives for a token: logits, or one value."""
        return 1 if self.value_head else self.vocab_size

    @property
    def mtp_num_layers(self) -> int:
        return len(self.mtp.layers) if self.mtp else 0

    @property
    def policy(self) -> ArchSpec:
        """The model without its MTP layers."""
        return self if self.mtp is None else replace(self, mtp=None)

    @property
    def critic(self) -> ArchSpec:
        """The same decoder with a value head and no MTP layers."""
        return replace(self, mtp=None, value_head=True, tie_word_embeddings=False)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def shares_keys(self) -> bool:
        """Whether a layer attends to the keys of another."""
        return any(layer.attention.keys_of is not None for layer in self.layers)

    @cached_property
    def has_plain_attention(self) -> bool:
        """Whether the attention of all layers is plain (`AttentionSpec.is_plain`)."""
        return all(layer.attention.is_plain for layer in self.layers)

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with experts. Route tensors have one column per entry, in this order."""
        return tuple(i for i, layer in enumerate(self.layers) if isinstance(layer.mlp, MoeSpec))

    @property
    def is_moe(self) -> bool:
        return bool(self.moe_layers)

    @cached_property
    def moe(self) -> MoeSpec | None:
        """The routing shared by all MoE layers; None for a dense model."""
        found = [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoeSpec)]
        return found[0] if found else None

    @property
    def num_experts(self) -> int:
        """Experts per MoE layer; 0 for a dense model."""
        return self.moe.num_experts if self.moe else 0

    @property
    def top_k(self) -> int:
        """Experts each token visits in an MoE layer; 0 for a dense model."""
        return self.moe.top_k if self.moe else 0

    def num_parameters(self) -> int:
        """Distinct parameters: a tied head is counted once."""
        return self._embedding_parameters() + sum(
            self._layer_parameters(layer) + layer.mlp.num_parameters(self.hidden_size)
            for layer in self.layers
        )

    def num_active_parameters(self) -> int:
        """Parameters involved in one token, embedding and head included."""
        return self._embedding_parameters() + sum(
            self._layer_parameters(layer) + layer.mlp.num_active_parameters(self.hidden_size)
            for layer in self.layers
        )

    def _embedding_parameters(self) -> int:
        rows = self.vocab_size + (0 if self.tie_word_embeddings else self.head_rows)
        streams = self.streams.num_parameters(self.hidden_size, self.num_layers) if self.streams else 0
        return rows * self.hidden_size + self.hidden_size + streams

    def _layer_parameters(self, layer: LayerSpec) -> int:
        return layer.attention.num_parameters(self.hidden_size) + layer.num_norms * self.hidden_size
