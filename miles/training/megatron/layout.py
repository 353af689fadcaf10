"""How one model is cut over the ranks of a Megatron trainer, and which of megatron-core's ways it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from miles.arch.spec import ArchSpec, DenseMlpSpec
from miles.errors import MilesError

Implementation = Literal["local", "transformer_engine"]
Dispatcher = Literal["allgather", "alltoall", "flex"]


@dataclass(frozen=True)
class MegatronLayout:
    """Sizes of the parallel dimensions, under Megatron's names; data parallelism is what is left over.

    `implementation`: whose layers: megatron-core's own, or Transformer Engine's, which need a GPU.
    `virtual_stage_layers`: layers per stage of the interleaved pipeline schedule; None: not interleaved.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    virtual_stage_layers: int | None = None
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    sequence_parallel: bool = False
    implementation: Implementation = "local"
    dispatcher: Dispatcher = "alltoall"

    def virtual_stages(self, num_layers: int) -> int | None:
        """Model chunks per rank; None where the pipeline is not interleaved."""
        if self.virtual_stage_layers is None:
            return None
        return num_layers // self.pp // self.virtual_stage_layers

    def padded_vocab_size(self, vocab_size: int) -> int:
        """The least number of rows that tensor-parallel ranks share equally."""
        return -(-vocab_size // self.tp) * self.tp


def require_expressible(spec: ArchSpec) -> None:
    """Raise MilesError for a model that megatron-core's configuration cannot describe."""
    problems = tuple(_inexpressible(spec))
    if problems:
        raise MilesError(
            f"the Megatron trainer cannot express this model: {'; '.join(problems)}",
            where=spec.architecture,
            fix="use --train-backend native",
        )


def _inexpressible(spec: ArchSpec) -> list[str]:
    """One TransformerConfig holds for all layers."""
    problems = []
    if len({layer.attention for layer in spec.layers}) > 1:
        problems.append("its layers differ in their attention")
    if len({layer.mlp for layer in spec.layers if isinstance(layer.mlp, DenseMlpSpec)}) > 1:
        problems.append("its dense layers differ in width")
    if len({layer.mlp for layer in spec.layers if not isinstance(layer.mlp, DenseMlpSpec)}) > 1:
        problems.append("its MoE layers differ in their experts")
    if spec.layers[0].attention.qk_norm and spec.layers[0].attention.qk_norm_over != "head":
        problems.append("its query and key norms span all heads")
    if spec.layers[0].attention.latent is not None:
        problems.append("its latent attention is not carried")
    elif spec.layers[0].attention.rope.width is not None:
        problems.append("it rotates a part of each head, which is not carried")
    moe = spec.moe
    if moe is not None and (moe.scoring != "softmax" or moe.num_groups > 1 or moe.routed_scaling != 1):
        problems.append("its router has sigmoid scores, groups or a scale, which are not carried")
    if moe is not None and (moe.correction_bias or moe.shared_size):
        problems.append("its correction biases or shared experts are not carried")
    if spec.mtp is not None:
        problems.append("its MTP layers are not carried")
    return problems
