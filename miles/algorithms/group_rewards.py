"""Group normalisation of rewards: what GRPO and its relatives subtract and divide by.

Source: DeepSeekMath (arXiv 2402.03300) section 4.1; RLOO (arXiv 2402.14740); slime `ray/rollout.py`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import fsum, sqrt
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor

from miles.errors import DataError

Baseline = Literal["none", "mean", "mean_std", "leave_one_out"]
"""none: raw rewards; mean: minus the group mean; mean_std: also divided by the group's standard deviation;
leave_one_out: minus the mean of the other rollouts of the group."""

STD_EPSILON = 1e-6


@dataclass(frozen=True)
class GroupRewards:
    """Normalised rewards of N samples.

    `values_N` is float32 with 0 where `included_N` is False: samples without a reward take no part in any
    group and must not be trained on. `num_groups` counts groups with at least one reward, `num_flat_groups`
    those whose rewards are all equal (no learning signal under a group baseline).
    """

    values_N: Tensor
    included_N: Tensor
    num_groups: int
    num_flat_groups: int


def choose_baseline(
    default: Baseline, *, disable_rewards_normalization: bool, disable_std_normalization: bool
) -> Baseline:
    """The baseline that remains of an estimator's own after the two disabling switches."""
    if disable_rewards_normalization:
        return "none"
    if disable_std_normalization and default == "mean_std":
        return "mean"
    return default


def normalize_group_rewards(
    rewards: Sequence[float | None],
    groups: Sequence[Hashable],
    rollouts: Sequence[Hashable],
    baseline: Baseline = "mean_std",
) -> GroupRewards:
    """Normalise rewards inside each prompt group, one reward per rollout.

    Siblings (samples that share a rollout id, such as the turns of one episode) count once and must carry one
    reward. The standard deviation is the sample one (Bessel); 1e-6 is added to it; a group of one rollout,
    or one whose rewards are all equal, gets exactly 0 under any baseline but "none".

    Args:
        rewards: N rewards; None where there is none (excluded, see `GroupRewards.included_N`).
        groups: N prompt-group keys.
        rollouts: N rollout keys; a rollout belongs to one group.

    Raises:
        DataError: siblings with different rewards.
    """
    rewards_by_group = _rewards_by_group(rewards, groups, rollouts)
    flat_groups = {group for group, by_rollout in rewards_by_group.items() if _is_flat(by_rollout)}
    normalized = {
        group: _normalize_group(by_rollout, baseline) for group, by_rollout in rewards_by_group.items()
    }
    values = [
        normalized[group][rollout] if reward is not None else 0.0
        for reward, group, rollout in zip(rewards, groups, rollouts, strict=True)
    ]
    return GroupRewards(
        values_N=torch.tensor(values, dtype=torch.float32),
        included_N=torch.tensor([reward is not None for reward in rewards], dtype=torch.bool),
        num_groups=len(rewards_by_group),
        num_flat_groups=len(flat_groups),
    )


def _rewards_by_group(
    rewards: Sequence[float | None], groups: Sequence[Hashable], rollouts: Sequence[Hashable]
) -> dict[Hashable, dict[Hashable, float]]:
    found: dict[Hashable, dict[Hashable, float]] = {}
    for reward, group, rollout in zip(rewards, groups, rollouts, strict=True):
        if reward is None:
            continue
        by_rollout = found.setdefault(group, {})
        if by_rollout.setdefault(rollout, float(reward)) != float(reward):
            raise DataError(
                f"samples of one rollout carry different rewards ({by_rollout[rollout]} and {float(reward)})",
                where=f"group {group}, rollout {rollout}",
                why="group normalisation counts a rollout once, so its samples must share a reward",
                fix="give every sample of a rollout the reward of the whole rollout",
            )
    return found


def _is_flat(by_rollout: dict[Hashable, float]) -> bool:
    return min(by_rollout.values()) == max(by_rollout.values())


def _normalize_group(by_rollout: dict[Hashable, float], baseline: Baseline) -> dict[Hashable, float]:
    if baseline == "none":
        return by_rollout
    if _is_flat(by_rollout):
        return dict.fromkeys(by_rollout, 0.0)
    values = list(by_rollout.values())
    mean, scale = fmean(values), 1.0
    if baseline == "mean_std":
        # statistics.stdev computes in fractions, which takes longer than the rest of the normalisation.
        variance = fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
        scale = 1.0 / (sqrt(variance) + STD_EPSILON)
    elif baseline == "leave_one_out":
        scale = len(values) / (len(values) - 1)
    return {rollout: (value - mean) * scale for rollout, value in by_rollout.items()}
