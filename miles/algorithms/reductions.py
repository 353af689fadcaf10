"""How per-token values become one number: weights over a whole optimizer step, so that loss = sum(w * value).

Because the weights are made once for the step, the loss, its gradient and every metric are the same however
the step is packed or cut into micro-batches.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from miles.algorithms.sequences import Sequences

Reduction = Literal["rollout_mean", "token_mean", "constant"]
"""rollout_mean: mean over the tokens of each rollout, then over rollouts. token_mean: mean over all tokens.
constant: sum over the tokens of each rollout divided by a constant, then mean over rollouts (Dr. GRPO,
arXiv 2503.20783)."""


def token_weights(
    loss_mask_T: Tensor,
    sequences: Sequences,
    rollout_ids_N: Tensor,
    reduction: Reduction,
    divisor: float | None = None,
) -> Tensor:
    """Weights float32 [T] over one whole optimizer step; 0 where the mask is 0.

    Tokens that a correction rejects later keep their place in the denominators. A rollout without a single
    unmasked token still counts as a rollout.

    Args:
        loss_mask_T: 1 where a token is trained on, else 0.
        rollout_ids_N: int [N]; sequences that share an id are siblings and form one rollout.
        divisor: the constant of `constant`, in tokens; required there.
    """
    mask_T = loss_mask_T.double()
    if reduction == "token_mean":
        return (mask_T / mask_T.sum().clamp_min(1.0)).float()
    unique_R, rollout_of_N = torch.unique(rollout_ids_N, return_inverse=True)
    num_rollouts = unique_R.numel()
    if reduction == "constant":
        assert divisor is not None and divisor > 0, "the constant reduction needs a positive divisor"
        return (mask_T / (divisor * num_rollouts)).float()
    tokens_R = torch.zeros(num_rollouts, dtype=torch.float64, device=mask_T.device)
    tokens_R.index_add_(0, rollout_of_N, sequences.sum(mask_T))
    per_sequence_N = 1.0 / (tokens_R.clamp_min(1.0) * num_rollouts)[rollout_of_N]
    return (mask_T * sequences.expand(per_sequence_N)).float()
