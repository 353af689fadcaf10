"""Rejection sampling: what the engine sampled and the trainer finds too unlikely, or too likely, is left out.

Source: masked importance sampling (Liu, Li et al., "When Speed Kills Stability", 2025) and miles'
`train_infer_mismatch_helper`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from miles.algorithms.importance import Level, importance_weights, outside
from miles.algorithms.sequences import Sequences


@dataclass(frozen=True)
class Rejection:
    """Leave out what has a weight outside [low, high]: tokens, or whole sequences at the other levels.

    `veto`: one token whose weight is below it takes its whole sequence along. Not `applied`: measured only.
    """

    level: Level = "token"
    low: float = 0.5
    high: float = 2.0
    veto: float | None = None
    applied: bool = True


@dataclass(frozen=True)
class Rejected:
    """float [T], 1 where a token was rejected: out of bounds, or by the veto of a token of its sequence."""

    bounds_T: Tensor
    veto_T: Tensor | None

    @property
    def kept_T(self) -> Tensor:
        """float [T]: 1 where a token stays in the loss."""
        kept_T = 1 - self.bounds_T
        return kept_T if self.veto_T is None else kept_T * (1 - self.veto_T)


def reject(log_ratio_T: Tensor, loss_mask_T: Tensor, sequences: Sequences, rejection: Rejection) -> Rejected:
    """Judge every token of `log_ratio_T` (see `importance`); masked tokens neither reject nor veto."""
    weights = importance_weights(log_ratio_T, loss_mask_T, sequences, rejection.level)
    bounds_T = outside(weights.value_T, rejection.low, rejection.high).to(log_ratio_T.dtype)
    return Rejected(bounds_T, _vetoed(log_ratio_T, loss_mask_T, sequences, rejection.veto))


def _vetoed(
    log_ratio_T: Tensor, loss_mask_T: Tensor, sequences: Sequences, veto: float | None
) -> Tensor | None:
    if veto is None:
        return None
    limit = math.log(veto) if veto > 0 else -math.inf
    below_T = ((log_ratio_T < limit) & (loss_mask_T > 0)).to(log_ratio_T.dtype)
    return sequences.expand((sequences.sum(below_T) > 0).to(log_ratio_T.dtype))
