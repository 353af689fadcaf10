"""A teacher beside the policy: another checkpoint of the same vocabulary, which only reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from miles.arch.spec import ArchSpec
from miles.data.batch import TrainBatch
from miles.training.native.micro_batches import MicroBatch, trained_sequences
from miles.training.native.ranks import Ranks

Read = Callable[[Sequence[MicroBatch]], list[Tensor]]
"""The log-probs [R] of each micro-batch's trained rows under the teacher. Collective."""


@dataclass(frozen=True)
class Teacher:
    """`cut`: a rank's share of the sequences, in micro-batches."""

    spec: ArchSpec
    cut: Callable[[TrainBatch, np.ndarray], list[MicroBatch]]
    read: Read
    ranks: Ranks

    def log_probs(self, batch: TrainBatch) -> np.ndarray:
        """float32 [T] of the batch's targets, NaN on untrained rows; its own experts, not the batch's routes,
        decide.
        """
        micro_batches = self.cut(replace(batch, routes=None), trained_sequences(batch))
        own = np.zeros(batch.num_tokens, dtype=np.float32)
        for micro_batch, log_probs_R in zip(micro_batches, self.read(micro_batches), strict=True):
            if not micro_batch.padding:
                own[micro_batch.trained_rows] = log_probs_R.cpu().numpy()
        values: np.ndarray = self.ranks.sum(torch.from_numpy(own)).numpy()
        values[batch.loss_mask == 0] = np.nan
        return values
