"""The processes that train one model together, as the trainer sees them; alone, every exchange is a no-op."""

from __future__ import annotations

import zlib
from typing import Protocol

from torch import Tensor

from miles.data.batch import TrainBatch
from miles.training.native.state import TrainerState


class Ranks(Protocol):
    """One process's view of all ranks. Every method is collective: all ranks call it, in the same order."""

    @property
    def rank(self) -> int:
        """0 .. size - 1."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over the ranks, the same on each; shape, dtype and device are kept."""

    def gather(self, values: Tensor) -> Tensor:
        """The 1-D tensors of all ranks, of any lengths, one after another in rank order."""

    def require_same_input(self, batch: TrainBatch, state: TrainerState) -> None:
        """Raise RunError on every rank when they were not given the same batch, knobs and step."""


class OneRank:
    """A trainer of one process."""

    rank = 0
    size = 1

    def sum(self, values: Tensor) -> Tensor:
        return values

    def gather(self, values: Tensor) -> Tensor:
        return values

    def require_same_input(self, batch: TrainBatch, state: TrainerState) -> None:
        return None


def input_digest(batch: TrainBatch, state: TrainerState) -> int:
    """A checksum of what decides the order of collectives and the loss: ranks that differ in it would hang
    or drift apart.
    """
    digest = zlib.crc32(repr(state).encode())
    for array in (batch.cu_seqlens, batch.tokens, batch.loss_mask, batch.rewards, batch.rollout_ids):
        digest = zlib.crc32(array.tobytes(), digest)
    for optional in (batch.routes, batch.advantages, batch.old_log_probs, batch.ref_log_probs):
        digest = zlib.crc32(b"" if optional is None else optional.tobytes(), digest)
    return digest
