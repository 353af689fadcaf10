"""A critic's values of the trained rows at the end of a pipeline.

Legend: t rows of this rank, R trained rows, r those of them on this rank, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from miles.training.megatron.attention import PackedRows
from miles.training.megatron.context_parallel import joined
from miles.training.megatron.layout import MegatronLayout
from miles.training.megatron.model import PolicyModel
from miles.training.megatron.passes import Chunks, Pass, PassSettings
from miles.training.native.micro_batches import MicroBatch

ValueLoss = Callable[[int, Tensor], Tensor]
"""(place of the micro-batch, its values [R]) -> the loss to differentiate."""

BY_ITSELF = PassSettings(replay=False, measure=False, temperature=1.0, with_entropy=False, chunk_tokens=None)
"""A critic follows no routes: recorded ones are the policy's."""


class ValuePass(Pass):
    """One pass of a critic over micro-batches. With a loss it leaves gradients, else it runs without."""

    def __init__(self, chunks: Chunks, loss: ValueLoss | None) -> None:
        super().__init__(
            chunks, BY_ITSELF, None if loss is None else lambda index, values_R, _: loss(index, values_R)
        )

    def values(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Detached values fp32 [R] of each micro-batch, on every process."""
        self._go_through(micro_batches)
        return self._at_end(micro_batches)[0]

    def _read(
        self, chunk: PolicyModel, hidden: Tensor, rows: PackedRows, micro_batch: MicroBatch
    ) -> tuple[Tensor, Tensor | None]:
        return trained_values(chunk, self._chunks.layout, hidden, rows, micro_batch), None


def trained_values(
    model: PolicyModel,
    layout: MegatronLayout,
    hidden_t1D: Tensor,
    rows: PackedRows,
    micro_batch: MicroBatch,
) -> Tensor:
    """Values fp32 [R], the same on all tensor- and context-parallel ranks; the head computes in fp32.

    Every rank has the whole head and computes the same loss. So what sequence parallelism gathers are values,
    and backward takes each rank's own rows of the gradient.
    """
    values_t = (hidden_t1D.float() @ model.head_weight.float().t()).flatten()
    if layout.sequence_parallel:
        values_t = gather_from_sequence_parallel_region(values_t, tensor_parallel_output_grad=False)
    if rows.split is None:
        return values_t.index_select(0, micro_batch.trained_R)
    mine_R, places_r = rows.split.places(micro_batch.trained_R)
    return joined(values_t.index_select(0, places_r), mine_R)
