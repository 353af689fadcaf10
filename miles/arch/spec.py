"""What a model is, as frozen data: everything that needs to know an architecture reads these classes.

All sizes are counts (heads, experts, layers) or widths in elements. Nothing here loads weights or torch.
"""

from __future__ import annotations

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
class RopeSpec:
    """Rotary position embedding (https://arxiv.org/abs/2104.09864)."""

    theta: float
    scaling: Llama3Scaling | LinearScaling | None = None
    width: int | None = None
    """Elements at the start of a head that are rotated; None: all."""


@dataclass(frozen=True)
class AttentionSpec:
    """Grouped-query attention. `qk_norm`: RMSNorm over queries and keys before the rotation.

    A token sees itself and all before it; `window`: itself and the `window` - 1 tokens before it.
    `softcap`: scores s become softcap · tanh(s / softcap) (https://arxiv.org/abs/2408.00118).
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
    softcap: float | None = None

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
        """Weights of the key norm."""
        return self.head_dim if self.qk_norm_over == "head" else self.kv_width

    @property
    def is_plain(self) -> bool:
        """Whether every token sees all before it, by scores as they are."""
        return self.window is None and self.softcap is None

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
        return self.query_width + 2 * self.kv_width

    def num_parameters(self, hidden_size: int) -> int:
        projections = (self.qkv_width + self.query_width) * hidden_size
        biases = self.qkv_bias * self.qkv_width + self.output_bias * hidden_size
        return projections + biases + self.qk_norm * (self.q_norm_width + self.k_norm_width)


@dataclass(frozen=True)
class DenseMlpSpec:
    """A gated block: down(activation(gate(x)) * up(x)), no biases (https://arxiv.org/abs/2002.05202)."""

    intermediate_size: int
    activation: Activation = "silu"

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
    root: str = "model"
    """Published name of the module that holds embedding, layers and final norm."""
    other_parts: tuple[str, ...] = ()
    """How names of tensors begin that belong to no part of the decoder (a vision tower): they are carried
    along as they are."""

    @property
    def embedding_name(self) -> str:
        return f"{self.root}.embed_tokens.weight"

    @property
    def head_name(self) -> str:
        """`lm_head` stands beside the module `model` that `root` ends in, or on top."""
        outer, _, last = self.root.rpartition(".")
        return f"{outer}.lm_head.weight" if outer and last == "model" else "lm_head.weight"

    @property
    def mtp_num_layers(self) -> int:
        return len(self.mtp.layers) if self.mtp else 0

    @property
    def policy(self) -> ArchSpec:
        """The model without its MTP layers."""
        return self if self.mtp is None else replace(self, mtp=None)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

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
        tables = 1 if self.tie_word_embeddings else 2
        return tables * self.vocab_size * self.hidden_size + self.hidden_size

    def _layer_parameters(self, layer: LayerSpec) -> int:
        return layer.attention.num_parameters(self.hidden_size) + layer.num_norms * self.hidden_size
