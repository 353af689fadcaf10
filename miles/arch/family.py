"""What a family module provides: its config.json reading and writing, and its published tensor names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from miles.arch.hf_config import HfConfig
from miles.arch.spec import ArchSpec, LayerSpec

Shape = tuple[int, ...]


@dataclass(frozen=True)
class MtpNames:
    """Published names of MTP tensors. `{depth}` counts MTP layers from 0, `{layer}` goes on after the last
    decoder layer.
    """

    layer: str
    """Prefix of a layer's attention, norms and MLP, which are called as in the decoder."""
    embedding_norm: str
    hidden_norm: str
    fc: str
    final_norm: str
    embedding_copy: str = ""
    """Where a checkpoint may hold the model's embedding a second time; empty: nowhere."""
    head_copy: str = ""

    def at(self, depth: int, num_layers: int) -> MtpNames:
        """The names of one depth of a model with so many decoder layers."""
        filled = {k: text.format(depth=depth, layer=num_layers + depth) for k, text in vars(self).items()}
        return MtpNames(**filled)


@dataclass(frozen=True)
class MoeNames:
    """Published names of the tensors of a block of experts. `block` stands behind the prefix of the layer,
    the others behind the block, those of a SwiGLU's projections behind `experts.<i>` as well.
    """

    block: str = "mlp"
    router: str = "gate.weight"
    correction_bias: str = "gate.e_score_correction_bias"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    dense_block: str = "mlp"
    """The block of a layer without experts."""
    shared: str = "shared_experts"
    """The shared experts, whose projections are called as in a dense layer."""


MOE_NAMES = MoeNames()


@dataclass(frozen=True)
class Family:
    """One row per supported family. `name` is the `model_type` of its config.json."""

    name: str
    architectures: tuple[str, ...]
    from_hf_config: Callable[[HfConfig], ArchSpec]
    to_hf_config: Callable[[ArchSpec], dict[str, Any]]
    published_tensors: Callable[[ArchSpec], Iterator[tuple[str, Shape]]]
    """Every tensor of the published checkpoint but those of MTP layers, by name and shape."""
    layer_tensors: Callable[[str, LayerSpec, int], Iterator[tuple[str, Shape]]]
    """The tensors of one layer under a prefix like `model.layers.0`, given the hidden size."""
    mtp_names: MtpNames
    shared_mtp_projection: bool
    """Whether all MTP layers of this family share the norms and the projection around them."""
    moe_names: MoeNames = MOE_NAMES
    takes_mtp: bool = True
    """Whether MTP layers can be added to it: their norms and embeddings are those of a plain decoder."""

    def mtp_tensors(self, spec: ArchSpec) -> Iterator[tuple[str, Shape]]:
        """The tensors of the MTP layers; none without such layers."""
        if spec.mtp is None:
            return
        width = spec.hidden_size
        for depth in range(spec.mtp.num_projections):
            names = self.mtp_names.at(depth, spec.num_layers)
            yield names.fc, (width, 2 * width)
            for norm in (names.embedding_norm, names.hidden_norm, names.final_norm):
                yield norm, (width,)
        for depth, layer in enumerate(spec.mtp.layers):
            prefix = self.mtp_names.at(depth, spec.num_layers).layer
            yield from self.layer_tensors(prefix, layer, width)

    def mtp_copies(self, spec: ArchSpec) -> Iterator[tuple[str, str]]:
        """Names of tensors that a checkpoint with MTP layers may hold twice, with the name of the first."""
        for depth in range(spec.mtp_num_layers):
            names = self.mtp_names.at(depth, spec.num_layers)
            if names.embedding_copy:
                yield names.embedding_copy, spec.embedding_name
            if names.head_copy:
                tied = spec.tie_word_embeddings
                yield names.head_copy, spec.embedding_name if tied else spec.head_name
