"""Between the filter and the trainer: the user's sample filter, and what becomes of rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from miles.config import RunConfig
from miles.data.hooks import Hook, HookError, call_hook, hook_name, hook_place, load_hook
from miles.data.sample import Sample
from miles.planning.plan import Plan
from miles.rewards.shaping import OverlongPenalty, penalize_overlong
from miles.rollout.collect import Group

POST_PROCESS = "--custom-reward-post-process-path"
SAMPLE_FILTER = "--rollout-sample-filter-path"


@dataclass(frozen=True)
class Shaping:
    """What is done with the accepted groups of a step, before they are trained on."""

    config: RunConfig
    overlong: OverlongPenalty | None = None
    post_process: Hook | None = None
    sample_filter: Hook | None = None

    @classmethod
    def of(cls, config: RunConfig, plan: Plan) -> Shaping:
        """As the run file asks."""
        reward = config.reward
        length, factor = reward.overlong_buffer_len, reward.overlong_penalty_factor
        return cls(
            config,
            OverlongPenalty(plan.max_response_len, length, factor) if length else None,
            _hook(reward.custom_reward_post_process_path, POST_PROCESS),
            _hook(config.rollout.rollout_sample_filter_path, SAMPLE_FILTER),
        )

    async def filter(self, groups: Sequence[Group]) -> None:
        """`(args, groups)` sets `remove_sample` on samples that are to stay out of the loss."""
        if self.sample_filter is not None:
            await call_hook(self.sample_filter, self.config, groups)

    async def shape(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Set `shaped_reward` where rewards are shaped; metrics of it."""
        if self.overlong is not None:
            return penalize_overlong(samples, self.overlong, self.config.reward.reward_key)
        if self.post_process is None:
            return {}
        result = await call_hook(self.post_process, self.config, list(samples))
        raw, rewards = result if isinstance(result, tuple) and len(result) == 2 else (None, result)
        for sample, reward in zip(samples, _numbers(self.post_process, rewards, samples), strict=True):
            sample.shaped_reward = reward
        if raw is None:
            return {}
        return {"rollout/raw_reward": fmean(_numbers(self.post_process, raw, samples))}


def _hook(path: str | None, flag: str) -> Hook | None:
    return None if path is None else load_hook(path, flag)


def _numbers(hook: Hook, values: Any, samples: Sequence[Sample]) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != len(samples) or not all(map(math.isfinite, numbers)):
        raise HookError(
            f"{hook_name(hook)} returned {type(values).__name__} for {len(samples)} samples",
            where=hook_place(hook),
            why="it has to return (raw_rewards, rewards), or rewards: one finite number for each sample",
        )
    return numbers
