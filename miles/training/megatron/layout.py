"""How one model is cut over the ranks of a Megatron trainer, and which of megatron-core's ways it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from miles.arch.megatron import megatron_obstacle
from miles.arch.spec import ArchSpec
from miles.errors import MilesError
from miles.training.megatron.options import DEFAULTS, MegatronOptions

Implementation = Literal["local", "transformer_engine"]
Dispatcher = Literal["allgather", "alltoall", "flex"]


@dataclass(frozen=True)
class MegatronLayout:
    """Sizes of the parallel dimensions, under Megatron's names; data parallelism is what is left over.

    `implementation`: whose layers: megatron-core's own, or Transformer Engine's, which need a GPU.
    `options`: what else is chosen of them.
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
    options: MegatronOptions = DEFAULTS

    def virtual_stages(self, num_layers: int) -> int | None:
        """Model chunks per rank; None where the pipeline is not interleaved."""
        if self.virtual_stage_layers is None:
            return None
        return num_layers // self.pp // self.virtual_stage_layers

    def padded_vocab_size(self, vocab_size: int) -> int:
        """The least number of rows that tensor-parallel ranks share equally."""
        return -(-vocab_size // self.tp) * self.tp


def require_expressible(spec: ArchSpec, layout: MegatronLayout | None = None) -> None:
    """Raise MilesError for a model that the Megatron trainer does not carry in this layout."""
    layout = layout or MegatronLayout()
    obstacle = megatron_obstacle(spec, engine=layout.implementation == "transformer_engine")
    fix = "use --train-backend native"
    if not obstacle and layout.cp > 1 and spec.has_indexer:
        obstacle, fix = "an indexer over context-parallel ranks", "use --context-parallel-size 1"
    if obstacle:
        raise MilesError(f"the Megatron trainer does not carry {obstacle}", where=spec.architecture, fix=fix)
