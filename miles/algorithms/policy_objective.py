"""The policy-gradient term per token: clipped ratio, dual clip, sequence ratio (GSPO), CISPO.

Sources: PPO (arXiv 1707.06347), dual clip (arXiv 1912.09729), clip-higher (DAPO, arXiv 2503.14476), GSPO
(arXiv 2507.18071), CISPO (MiniMax-M1, arXiv 2506.13585).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from miles.algorithms.sequences import Sequences

Objective = Literal["clip", "sequence_clip", "cispo"]

LOG_RATIO_BOUND = 20.0


@dataclass(frozen=True)
class ClipRange:
    """The ratio stays in [1 - low, 1 + high]; `dual` > 1 also bounds the loss of negative advantages."""

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None


@dataclass(frozen=True)
class Ratio:
    """Drift d = lp_old - lp [T], ratio exp(-d) [T], and how many drifts were bounded at +-20."""

    drift_T: Tensor
    value_T: Tensor
    num_bounded: Tensor


def probability_ratio(
    log_probs_T: Tensor,
    old_log_probs_T: Tensor,
    loss_mask_T: Tensor,
    sequences: Sequences,
    objective: Objective,
) -> Ratio:
    """Ratio of the current to the old policy per token; GSPO gives each token its sequence's geometric mean.

    A drift beyond +-20 is bounded before exp (it carries no gradient then) and counted in `num_bounded`. NaN
    passes through.
    """
    drift_T = old_log_probs_T - log_probs_T
    if objective == "sequence_clip":
        drift_T = sequences.expand(sequences.mean(drift_T, loss_mask_T))
    bounded_T = drift_T.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    num_bounded = ((drift_T.detach().abs() > LOG_RATIO_BOUND) * loss_mask_T).sum()
    return Ratio(bounded_T, torch.exp(-bounded_T), num_bounded)


def policy_gradient_loss(
    ratio: Ratio, log_probs_T: Tensor, advantages_T: Tensor, objective: Objective, clip: ClipRange
) -> tuple[Tensor, Tensor]:
    """Loss per token [T] and where clipping took effect (float32 [T], no gradient)."""
    clipped_T = ratio.value_T.clamp(1 - clip.low, 1 + clip.high)
    if objective == "cispo":
        loss_T = -clipped_T.detach() * advantages_T * log_probs_T
        return loss_T, (clipped_T != ratio.value_T).float()
    plain_T = -ratio.value_T * advantages_T
    bounded_T = -clipped_T * advantages_T
    loss_T = torch.maximum(plain_T, bounded_T)
    if clip.dual is not None:
        dual_T = torch.minimum(-clip.dual * advantages_T, loss_T)
        loss_T = torch.where(advantages_T < 0, dual_T, loss_T)
    return loss_T, (bounded_T.detach() > plain_T.detach()).float()
