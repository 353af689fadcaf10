"""Dynamic sampling filters: which scored groups are worth training on (DAPO,
https://arxiv.org/abs/2503.14476)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from miles.data.sample import Sample, SampleStatus
from miles.rollout.statistics import ZERO_STD, reward_std

DynamicFilter = Callable[[Sequence[Sample]], str | None]
"""A scored group to the reason for which it is dropped; None keeps it."""


def check_reward_nonzero_std(reward_key: str | None = None) -> DynamicFilter:
    """Drop groups whose rewards are all equal: after group normalisation they have no gradient."""

    def zero_std(group: Sequence[Sample]) -> str | None:
        rewards = [sample.reward_value(reward_key) for sample in group]
        known = [reward for reward in rewards if reward is not None]
        if len(known) < len(rewards):
            return "none_reward"
        return None if reward_std(known) > ZERO_STD else f"zero_std_{round(known[0], 1):g}"

    return zero_std


def check_no_aborted(group: Sequence[Sample]) -> str | None:
    """Drop groups with an unfinished member."""
    return "aborted" if any(sample.status is SampleStatus.ABORTED for sample in group) else None
