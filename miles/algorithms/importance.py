"""Corrections for the gap between the engine that sampled and the trainer that learns.

`w = exp(lp_old - lp_rollout)` says how much more likely the trainer finds a token than the engine did.
Truncated importance sampling (TIS) clamps w; masking (IcePop, `--tis-threshold`) drops tokens whose w
leaves the interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImportanceCorrection:
    """Multiply the policy loss by w, kept in [low, high]; `outside` says what happens beyond."""

    low: float = 0.0
    high: float = 2.0
    outside: Literal["clamp", "mask"] = "clamp"

    def __post_init__(self) -> None:
        assert 0 <= self.low <= self.high, f"bounds {self.low}..{self.high} are not an interval"

    @classmethod
    def within_threshold(cls, threshold: float) -> ImportanceCorrection:
        """Keep w inside [T, 1/T] and mask outside, for 0 < T <= 1."""
        assert 0 < threshold <= 1, f"threshold {threshold} is not in (0, 1]"
        return cls(low=threshold, high=1.0 / threshold, outside="mask")


def importance_weights(old_log_probs_T: Tensor, rollout_log_probs_T: Tensor) -> Tensor:
    """w = exp(lp_old - lp_rollout), without gradient, float32 [T]."""
    return torch.exp(old_log_probs_T.detach() - rollout_log_probs_T)


def bound_weights(weights_T: Tensor, correction: ImportanceCorrection) -> Tensor:
    """The factor on the policy loss: w clamped to the bounds, or 0 outside them. NaN stays NaN."""
    if correction.outside == "clamp":
        return weights_T.clamp(correction.low, correction.high)
    outside_T = (weights_T < correction.low) | (weights_T > correction.high)
    return weights_T.masked_fill(outside_T, 0.0)
