"""What becomes of a reward before it is normalised: the penalty of overlong responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from miles.data.sample import Sample


@dataclass(frozen=True)
class OverlongPenalty:
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13): over the last `buffer_len` tokens
    before `max_len` a penalty grows from 0 to `factor`.
    """

    max_len: int
    buffer_len: int
    factor: float = 1.0

    def of(self, length: int) -> float:
        """At most 0, for a response of `length` tokens."""
        excess = length - (self.max_len - self.buffer_len)
        return min(-excess / self.buffer_len * self.factor, 0.0)


def penalize_overlong(
    samples: Sequence[Sample], penalty: OverlongPenalty, reward_key: str | None = None
) -> dict[str, float]:
    """Set `shaped_reward` of every sample that has a reward; returns the metrics of it.

    Samples of one rollout share a reward, so they share the penalty of the longest of them.
    """
    judged = [sample for sample in samples if sample.reward is not None]
    if not judged:
        return {}
    rollouts = [-1 - i if s.rollout_id is None else s.rollout_id for i, s in enumerate(judged)]
    longest: dict[int, int] = {}
    for rollout, sample in zip(rollouts, judged, strict=True):
        longest[rollout] = max(longest.get(rollout, 0), sample.response_length)
    penalties = [penalty.of(longest[rollout]) for rollout in rollouts]
    for sample, value in zip(judged, penalties, strict=True):
        reward = sample.reward_value(reward_key)
        sample.shaped_reward = None if reward is None else reward + value
    return {
        "rollout/overlong_penalty": fmean(penalties),
        "rollout/overlong_frac": fmean(float(value < 0) for value in penalties),
    }
