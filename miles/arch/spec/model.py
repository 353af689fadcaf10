"""The model as a whole: its layers, the MTP layers beside them, what surrounds both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from miles.arch.spec.attention import AttentionSpec
from miles.arch.spec.mlp import DenseMlpSpec, MoeSpec

Dtype = Literal["fp32", "bf16", "fp16"]


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
    def has_indexer(self) -> bool:
        """Whether an indexer chooses what attention sees; of some layers, or all."""
        return any(layer.attention.indexer is not None for layer in self.layers)

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
