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
    `values_T` are the critic's, read by estimators that use them; on rows of mask 0 they may be NaN.
    """

    rewards_N: Tensor
    loss_mask_T: Tensor
    sequences: Sequences
    kl_T: Tensor | None = None
    kl_coef: float = 0.0
    gamma: float = 1.0
    values_T: Tensor | None = None
    lambd: float = 1.0

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
    """G_t = r_t + gamma * G_{t+1} over the trained tokens of a sequence (REINFORCE++), r_t as in `_Steps`."""
    steps = _Steps(rows)
    return steps.to_rows(_decayed_sums(steps.rewards_NL(), rows.gamma))


def generalised_advantages(rows: AdvantageRows) -> Tensor:
    """GAE(gamma, lambda) over the trained tokens of a sequence (PPO). Source: https://arxiv.org/abs/1506.02438,
    eq. 16, as a recursion:

    delta_t = r_t + gamma * V_{t+1} - V_t,  A_t = delta_t + gamma * lambda * A_{t+1},

    with r_t as in `_Steps` and V = A = 0 behind the last trained token, of a truncated response too. The
    critic is taught A_t + V_t.
    """
    assert rows.values_T is not None, "GAE reads a critic's values"
    steps = _Steps(rows)
    values_NL = steps.table(rows.values_T)
    following_NL = torch.nn.functional.pad(values_NL[:, 1:], (0, 1))
    delta_NL = steps.rewards_NL() + rows.gamma * following_NL - values_NL
    return steps.to_rows(_decayed_sums(delta_NL, rows.gamma * rows.lambd))


class _Steps:
    """The trained tokens of each sequence as the L steps of an episode, in tables float64 [N, L] that are 0
    behind a sequence's last step.

    The reward of a step is its KL penalty, plus the sequence's reward at its last step. Tokens that are not
    trained on (tool output) are no steps: they neither earn nor decay.
    """

    def __init__(self, rows: AdvantageRows) -> None:
        self._rows = rows
        self._row_S = (rows.loss_mask_T > 0).nonzero().squeeze(1)
        self._sequence_S = rows.sequences.index_T[self._row_S]
        self._count_N = torch.bincount(self._sequence_S, minlength=rows.sequences.count)
        first_N = self._count_N.cumsum(0) - self._count_N
        places_S = torch.arange(self._row_S.numel(), device=self._row_S.device)
        self._column_S = places_S - first_N[self._sequence_S]

    def rewards_NL(self) -> Tensor:
        """The reward of each step."""
        table_NL, rewards_N = self.table(self._rows.penalty_T), self._rows.rewards_N
        nonempty = self._count_N.nonzero().squeeze(1)
        table_NL[nonempty, self._count_N[nonempty] - 1] += rewards_N[nonempty].double()
        return table_NL

    def table(self, values_T: Tensor) -> Tensor:
        """Row values at their steps."""
        columns = int(self._count_N.max()) if self._count_N.numel() else 0
        table_NL = values_T.new_zeros((self._rows.sequences.count, columns), dtype=torch.float64)
        table_NL[self._sequence_S, self._column_S] = values_T[self._row_S].double()
        return table_NL

    def to_rows(self, table_NL: Tensor) -> Tensor:
        """The reverse: float32 [T], 0 on rows that are no step."""
        values_T = torch.zeros_like(self._rows.loss_mask_T)
        values_T[self._row_S] = table_NL[self._sequence_S, self._column_S].to(values_T.dtype)
        return values_T


def _decayed_sums(values_NL: Tensor, decay: float) -> Tensor:
    """S_t = x_t + decay * S_{t+1} along the steps."""
    sums_NL = torch.empty_like(values_NL)
    running_N = values_NL.new_zeros(values_NL.shape[0])
    for column in reversed(range(values_NL.shape[1])):
        running_N = values_NL[:, column] + decay * running_N
        sums_NL[:, column] = running_N
    return sums_NL


@dataclass(frozen=True)
class Estimator:
    """One advantage estimator and what belongs to its definition."""

    baseline: Baseline
    spread: Callable[[AdvantageRows], Tensor]
    objective: Objective = "clip"
    needs_whitening: bool = False
    uses_kl_penalty: bool = False
    uses_values: bool = False
    """It reads the values of a critic, which learns from A_t + V_t."""
    constant_divisor: bool = False
    """The loss is divided by the longest possible response instead of each rollout's own length."""


ESTIMATORS: dict[str, Estimator] = {
    "grpo": Estimator("mean_std", broadcast),
    "gspo": Estimator("mean_std", broadcast, objective="sequence_clip"),
    "cispo": Estimator("mean_std", broadcast, objective="cispo"),
    "dr_grpo": Estimator("mean", broadcast, constant_divisor=True),
    "rloo": Estimator("leave_one_out", broadcast),
    "ppo": Estimator("none", generalised_advantages, uses_kl_penalty=True, uses_values=True),
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
