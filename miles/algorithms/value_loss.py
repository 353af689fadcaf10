"""What a critic learns: the clipped value loss of PPO, and how much of the returns its values explain."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from miles.algorithms.losses import LossOutput


@dataclass(frozen=True)
class ValueRows:
    """Trained rows of one micro-batch, all float32 [T]. `values_T` carries gradient; `old_values_T` are those
    before the update and `weights_T` come from `reductions.token_weights` over the whole step.
    """

    values_T: Tensor
    old_values_T: Tensor
    returns_T: Tensor
    weights_T: Tensor


def value_loss(rows: ValueRows, clip: float) -> LossOutput:
    """max((V - R)^2, (V_old + clamp(V - V_old, -clip, clip) - R)^2), without a factor 1/2.

    Source: PPO's reference implementation (openai/baselines, ppo2/model.py); slime and miles have the same
    form. Metrics, additive over micro-batches: value_loss, and value_clipfrac, the share of tokens whose
    value moved so far towards its return that the clipped term, without a gradient there, is the larger one.
    """
    move_T = (rows.values_T - rows.old_values_T).clamp(-clip, clip)
    free_T = (rows.values_T - rows.returns_T).square()
    bounded_T = (rows.old_values_T + move_T - rows.returns_T).square()
    loss = (rows.weights_T * torch.maximum(free_T, bounded_T)).sum()
    clipped = (rows.weights_T * (bounded_T > free_T)).sum()
    return LossOutput(loss, {"value_loss": loss.detach(), "value_clipfrac": clipped.detach()})


def explained_variance(values_T: Tensor, returns_T: Tensor, loss_mask_T: Tensor) -> float | None:
    """1 - Var(R - V) / Var(R) over rows of mask 1: 1 for a critic that knows every return, 0 for one that
    knows their mean, below 0 for a worse one. None where all returns are equal.
    """
    trained_T = loss_mask_T > 0
    returns_R = returns_T[trained_T].double()
    spread = returns_R.var(unbiased=False)
    if spread == 0:
        return None
    return float(1 - (returns_R - values_T[trained_T].double()).var(unbiased=False) / spread)
