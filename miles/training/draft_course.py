"""What the MTP layers are taught in one optimizer step, whichever trainer holds them.

Depth k at row t reads the trunk at token t and the embedding of token t + 1 + k. It is taught token t + 2 + k
by cross-entropy, where all tokens from t + 1 on are trained on: for depth 0 the loss mask shifted once times
the mask shifted twice. There may be more depths than layers: the last layer then goes on from its own
features, as it does in the engine. The loss of a depth is a mean over the whole optimizer step, so cutting
into micro-batches or over ranks does not change it.

Legend: P packed rows of a micro-batch, R of them taught at one depth, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from miles.data.batch import TrainBatch
from miles.training.native.micro_batches import MicroBatch

CrossEntropy = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Features [R, D] and targets int64 [R] -> summed over rows: nats, with gradient, and how many targets were
the first choice.
"""


@dataclass(frozen=True)
class Lesson:
    """Taught at one depth: `tokens` int64 [P] are its input, `targets` [R] the goal at `rows` int64 [R]."""

    tokens: np.ndarray
    rows: np.ndarray
    targets: np.ndarray


def lessons(batch: TrainBatch, packed: np.ndarray, cu_seqlens: np.ndarray, depths: int) -> Iterator[Lesson]:
    """The lessons of depth 0, 1, … for the batch's rows `packed`, sequences cut at `cu_seqlens`."""
    lengths = np.diff(cu_seqlens)
    last = np.repeat(cu_seqlens[1:] - 1, lengths)
    place = np.arange(len(packed))
    mask, targets = batch.loss_mask[packed] > 0, batch.targets[packed]
    taught = mask
    for depth in range(depths):
        here, after = np.minimum(place + depth, last), np.minimum(place + depth + 1, last)
        taught = taught & mask[after] & (place + depth + 1 <= last)
        rows = np.flatnonzero(taught)
        yield Lesson(targets[here], rows, targets[after[rows]])


@dataclass
class DraftUpdate:
    """The draft's side of one optimizer step: what its micro-batches add up to."""

    counts: list[int]
    """Rows taught at each depth, over the whole step and all ranks. The first is not 0."""
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value


@dataclass(frozen=True)
class DraftCourse:
    """`depths`: tokens ahead that are taught; `loss_scale` weighs their loss."""

    depths: int
    loss_scale: float

    def begin(self, batch: TrainBatch, indices_N: np.ndarray) -> DraftUpdate | None:
        """A step over these sequences of the batch; None where they have nothing to teach."""
        packed, cu_seqlens = _rows_of(batch, indices_N)
        counts = [len(lesson.rows) for lesson in lessons(batch, packed, cu_seqlens, self.depths)]
        return DraftUpdate(counts) if counts[0] else None

    def lessons(self, batch: TrainBatch, micro_batch: MicroBatch) -> list[Lesson]:
        """Of a micro-batch, by depth."""
        cu_seqlens = micro_batch.cu_seqlens_N1.cpu().numpy()
        return list(lessons(batch, micro_batch.packed_rows, cu_seqlens, self.depths))

    @staticmethod
    def chain_inputs(
        taught: Sequence[Lesson], batch: TrainBatch, micro_batch: MicroBatch, device: torch.device
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """What a chain reads beside hidden states: tokens [P] and rows [R] by depth, and positions [P]."""
        tokens = [torch.from_numpy(lesson.tokens).to(device) for lesson in taught]
        rows = [torch.from_numpy(lesson.rows).to(device) for lesson in taught]
        return tokens, rows, torch.from_numpy(batch.positions[micro_batch.packed_rows]).to(device)

    def backward(
        self,
        update: DraftUpdate,
        taught: Sequence[Lesson],
        features: Sequence[Tensor],
        cross_entropy: CrossEntropy,
        padding: bool,
    ) -> None:
        """The gradient of a micro-batch whose features by depth are `features` [R, D], and its metrics into
        `update`. `padding`: it counts for nothing.
        """
        reached = [depth for depth, count in enumerate(update.counts) if count]
        loss = features[0].new_zeros((), dtype=torch.float32)
        for depth in reached:
            targets = torch.from_numpy(taught[depth].targets).to(loss.device)
            entropy, correct = cross_entropy(features[depth], targets)
            share = (0.0 if padding else 1.0) / update.counts[depth]
            loss = loss + entropy * (share / len(reached))
            update.add({f"mtp_accuracy/depth_{depth + 1}": correct * share})
        update.add({"mtp_loss": loss.detach()})
        (loss * self.loss_scale).backward()


def _rows_of(batch: TrainBatch, indices_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of these sequences, one sequence after another, and where each begins [N + 1]."""
    lengths = batch.lengths[indices_N]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    shift = np.repeat(batch.cu_seqlens[indices_N] - cu_seqlens[:-1], lengths)
    return np.arange(cu_seqlens[-1]) + shift, cu_seqlens
