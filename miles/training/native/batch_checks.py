"""What a batch must satisfy before it reaches a model."""

from __future__ import annotations

import numpy as np

from miles.arch.spec import ArchSpec
from miles.data.batch import TrainBatch
from miles.errors import DataError


def validate_batch(batch: TrainBatch, spec: ArchSpec) -> None:
    """Raise DataError when the batch's routes cannot belong to this model."""
    if batch.routes is None:
        return
    expected = (len(spec.moe_layers), spec.top_k)
    if batch.routes.shape[1:] != expected:
        raise DataError(
            f"routes have shape [rows, {batch.routes.shape[1]}, {batch.routes.shape[2]}], "
            f"this model needs [rows, {expected[0]}, {expected[1]}]",
            why="routes are [rows, MoE layers, experts per token]",
            fix="check that the engine runs the model that is being trained",
        )
    low, high = int(batch.routes.min()), int(batch.routes.max())
    if low < -1 or high >= spec.num_experts:
        raise DataError(
            f"routes name experts {low} .. {high}, this model has 0 .. {spec.num_experts - 1}",
            fix="check that the engine runs the model that is being trained",
        )


def require_rollout_log_probs(batch: TrainBatch) -> None:
    """Raise DataError when a trained token lacks the engine's log-prob although the loss reads it."""
    missing = (batch.loss_mask > 0) & np.isnan(batch.rollout_log_probs)
    if missing.any():
        sample = batch.sample_index[batch.sequence_ids[missing.argmax()]]
        raise DataError(
            f"{int(missing.sum())} trained tokens carry no log-prob from the engine",
            where=f"first in sample {sample}",
            why="importance corrections and use_rollout_logprobs read the log-prob of every trained token",
            fix="mask tokens that the engine did not sample, or switch the correction off",
        )
