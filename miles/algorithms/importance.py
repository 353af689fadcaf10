"""Importance weights for the gap between the engine that sampled and the trainer that learns.

`w = exp(lp_old - lp_rollout)` says how much more likely the trainer finds what the engine sampled: a token
(`token`), the whole response (`sequence`: the product over its tokens), or its average token (`geometric`:
the geometric mean). Sources: truncated importance sampling (F. Yao et al., "Your Efficient RL Framework
Secretly Brings You Off-Policy RL Training", 2025), its masked form at the three levels (Liu, Li et al., "When
Speed Kills Stability", 2025), IcePop (Ling team, arXiv 2510.18855).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from miles.algorithms.sequences import Sequences

Level = Literal["token", "sequence", "geometric"]

LOG_WEIGHT_BOUND = 20.0
"""A log-weight is bounded at +-20 before exp, as upstream does: a product over a long response overflows."""


@dataclass(frozen=True)
class ImportanceCorrection:
    """Multiply the policy loss by w, kept in [low, high]; `outside` says what happens beyond.

    `clamp` cuts w to the nearer bound (with `low` 0: truncation), `mask` puts 0 in its place (IcePop).
    `batch_normalize` divides by the mean over the optimizer step (`mean_weight`). Not `applied`: only
    measured.
    """

    low: float = 0.0
    high: float = 2.0
    outside: Literal["clamp", "mask"] = "clamp"
    level: Level = "token"
    batch_normalize: bool = False
    applied: bool = True
    threshold: float | None = None
    """What the bounds were made of, by `within`."""

    def __post_init__(self) -> None:
        assert 0 <= self.low <= self.high, f"bounds {self.low}..{self.high} are not an interval"

    @classmethod
    def within_threshold(cls, threshold: float) -> ImportanceCorrection:
        """Keep w inside [T, 1/T] and mask outside, for 0 < T <= 1."""
        return cls().within(threshold)

    def within(self, threshold: float) -> ImportanceCorrection:
        """This correction with the bounds of `within_threshold`."""
        assert 0 < threshold <= 1, f"threshold {threshold} is not in (0, 1]"
        return replace(self, low=threshold, high=1.0 / threshold, outside="mask", threshold=threshold)


@dataclass(frozen=True)
class Weights:
    """Log-weights and weights per token [T], and how many log-weights of trained tokens were bounded."""

    log_T: Tensor
    value_T: Tensor
    num_bounded: Tensor


def log_ratio(old_log_probs_T: Tensor, rollout_log_probs_T: Tensor) -> Tensor:
    """lp_old - lp_rollout, without gradient, float [T]."""
    return old_log_probs_T.detach() - rollout_log_probs_T


def importance_weights(
    log_ratio_T: Tensor, loss_mask_T: Tensor, sequences: Sequences, level: Level = "token"
) -> Weights:
    """w at a level, given to every token [T]; masked tokens have no part in their sequence. NaN stays NaN."""
    log_T = log_ratio_T
    if level == "sequence":
        log_T = sequences.expand(sequences.sum(log_ratio_T * loss_mask_T))
    elif level == "geometric":
        log_T = sequences.expand(sequences.mean(log_ratio_T, loss_mask_T))
    bounded_T = log_T.clamp(-LOG_WEIGHT_BOUND, LOG_WEIGHT_BOUND)
    num_bounded = ((log_T.abs() > LOG_WEIGHT_BOUND) * loss_mask_T).sum()
    return Weights(log_T, torch.exp(bounded_T), num_bounded)


def bound_weights(weights_T: Tensor, correction: ImportanceCorrection) -> Tensor:
    """The factor on the policy loss: w clamped to the bounds, or 0 outside them. NaN stays NaN."""
    if correction.outside == "clamp":
        return weights_T.clamp(correction.low, correction.high)
    return weights_T.masked_fill(outside(weights_T, correction.low, correction.high), 0.0)


def outside(weights_T: Tensor, low: float, high: float) -> Tensor:
    """bool [T]: where a weight leaves [low, high]; a NaN does not, so that it stays seen."""
    return (weights_T < low) | (weights_T > high)


def mean_weight(
    log_ratio_T: Tensor, loss_mask_T: Tensor, sequences: Sequences, correction: ImportanceCorrection
) -> float:
    """The mean of the bounded weights over one whole optimizer step, which batch normalisation divides by.

    At token level every trained token counts once, at the other levels every sequence with a trained token.
    What is masked does not count; 1 where nothing is left.
    """
    log_ratio_T = log_ratio_T.masked_fill(loss_mask_T == 0, 0.0)
    weights = importance_weights(log_ratio_T, loss_mask_T, sequences, correction.level)
    share_T = (loss_mask_T > 0).double()
    if correction.level != "token":
        share_T = share_T / sequences.expand(sequences.sum(share_T).clamp_min(1.0))
    if correction.outside == "mask":
        share_T = share_T * ~outside(weights.value_T, correction.low, correction.high)
    total = share_T.sum()
    if total == 0:
        return 1.0
    return float((share_T * bound_weights(weights.value_T, correction)).sum() / total)
