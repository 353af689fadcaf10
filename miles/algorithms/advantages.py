"""Advantage estimators by name: from one reward per sequence to one advantage per token.

An estimator names the group baseline its rewards get first (`group_rewards`), how rewards spread over
tokens, the policy objective it is defined with, and whether it needs whitening. A name that is not in
`ESTIMATORS` does not exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from miles.algorithms.group_rewards import Baseline
from miles.algorithms.policy_objective import Objective
from miles.algorithms.sequences import Sequences

WHITEN_EPSILON = 1e-8


@dataclass(frozen=True)
class AdvantageRows:
    """What estimators read. `rewards_N` are already normalised by the estimator's baseline.

    `kl_T` is the KL estimate to the reference that shapes rewards by `-kl_coef * kl`; None when kl_coef is 0.
    """

    rewards_N: Tensor
    loss_mask_T: Tensor
    sequences: Sequences
    kl_T: Tensor | None = None
    kl_coef: float = 0.0
    gamma: float = 1.0

    @property
    def penalty_T(self) -> Tensor:
        """KL reward shaping per token, 0 without a KL term."""
        if self.kl_T is None:
            return torch.zeros_like(self.loss_mask_T)
        return -self.kl_coef * self.kl_T.masked_fill(self.loss_mask_T == 0, 0.0)


def broadcast(rows: AdvantageRows) -> Tensor:
    """Every trained token gets its sequence's reward (GRPO, GSPO, RLOO, Dr. GRPO)."""
    return rows.sequences.expand(rows.rewards_N) * rows.loss_mask_T


def broadcast_with_penalty(rows: AdvantageRows) -> Tensor:
    """The sequence's reward minus the token's own KL penalty (REINFORCE++ with baseline)."""
    return broadcast(rows) + rows.penalty_T


def discounted_returns(rows: AdvantageRows) -> Tensor:
    """G_t = r_t + gamma * G_{t+1} over the trained tokens of a sequence (REINFORCE++).

    r_t is the KL penalty, plus the sequence's reward at its last trained token. Tokens that are not trained
    on (tool output) are no steps: they neither earn nor decay.
    """
    trained = rows.loss_mask_T > 0
    row_of_step = trained.nonzero().squeeze(1)
    sequence_of_step = rows.sequences.index_T[row_of_step]
    steps_N = torch.bincount(sequence_of_step, minlength=rows.sequences.count)
    first_step_N = steps_N.cumsum(0) - steps_N
    column_of_step = torch.arange(row_of_step.numel(), device=trained.device) - first_step_N[sequence_of_step]
    num_columns = int(steps_N.max()) if steps_N.numel() else 0

    rewards_NL = rows.penalty_T.new_zeros((rows.sequences.count, num_columns), dtype=torch.float64)
    rewards_NL[sequence_of_step, column_of_step] = rows.penalty_T[row_of_step].double()
    nonempty = steps_N.nonzero().squeeze(1)
    rewards_NL[nonempty, steps_N[nonempty] - 1] += rows.rewards_N[nonempty].double()

    returns_NL = torch.empty_like(rewards_NL)
    running_N = rewards_NL.new_zeros(rows.sequences.count)
    for column in reversed(range(num_columns)):
        running_N = rewards_NL[:, column] + rows.gamma * running_N
        returns_NL[:, column] = running_N
    advantages_T = torch.zeros_like(rows.loss_mask_T)
    advantages_T[row_of_step] = returns_NL[sequence_of_step, column_of_step].to(advantages_T.dtype)
    return advantages_T


@dataclass(frozen=True)
class Estimator:
    """One advantage estimator and what belongs to its definition."""

    baseline: Baseline
    spread: Callable[[AdvantageRows], Tensor]
    objective: Objective = "clip"
    needs_whitening: bool = False
    uses_kl_penalty: bool = False
    constant_divisor: bool = False
    """The loss is divided by the longest possible response instead of each rollout's own length."""


ESTIMATORS: dict[str, Estimator] = {
    "grpo": Estimator("mean_std", broadcast),
    "gspo": Estimator("mean_std", broadcast, objective="sequence_clip"),
    "cispo": Estimator("mean_std", broadcast, objective="cispo"),
    "dr_grpo": Estimator("mean", broadcast, constant_divisor=True),
    "rloo": Estimator("leave_one_out", broadcast),
    "reinforce_plus_plus": Estimator("none", discounted_returns, needs_whitening=True, uses_kl_penalty=True),
    "reinforce_plus_plus_baseline": Estimator(
        "mean", broadcast_with_penalty, needs_whitening=True, uses_kl_penalty=True
    ),
}


def whiten(advantages_T: Tensor, loss_mask_T: Tensor) -> Tensor:
    """Shift and scale to mean 0 and (Bessel) variance 1 over the batch's trained tokens; 0 elsewhere."""
    mask_T = loss_mask_T.double()
    count = mask_T.sum()
    mean = (advantages_T.double() * mask_T).sum() / count.clamp_min(1.0)
    centred_T = (advantages_T.double() - mean) * mask_T
    variance = centred_T.square().sum() / (count - 1).clamp_min(1.0)
    return (centred_T * torch.rsqrt(variance + WHITEN_EPSILON)).to(advantages_T.dtype)
