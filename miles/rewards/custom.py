"""The reward hook: a user's `(args, sample) -> float | dict`, or `(args, samples) -> list` per group."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal

from miles.data.hooks import Hook, HookError, call_hook, hook_name, hook_place
from miles.data.sample import Sample, SampleStatus
from miles.rewards.outcome import Outcome, RewardFailure, Verifier

ErrorPolicy = Literal["raise", "mark"]
"""`raise`: an exception of the function ends the run; `mark`: the sample becomes FAILED and has no reward."""


def per_sample(hook: Hook, args: Any, on_error: ErrorPolicy = "raise") -> Verifier:
    """Call the hook once per sample; async hooks run concurrently.

    A sync hook runs in the caller's thread, where signals and most libraries work; it holds generation up
    while it runs, so one that waits for something should be async.
    """

    async def judge_one(sample: Sample) -> Outcome:
        try:
            outcome: Outcome = await call_hook(hook, args, sample)
        except HookError as error:
            return _failed(error, [sample], on_error)[0]
        return outcome

    async def judge(samples: Sequence[Sample]) -> list[Outcome]:
        return list(await asyncio.gather(*(judge_one(sample) for sample in samples)))

    return judge


def per_group(hook: Hook, args: Any, on_error: ErrorPolicy = "raise") -> Verifier:
    """Call the hook once per prompt group with all of its samples; it returns one reward for each."""

    async def judge_group(group: list[Sample]) -> list[Outcome]:
        try:
            outcomes = await call_hook(hook, args, group)
        except HookError as error:
            return _failed(error, group, on_error)
        if not isinstance(outcomes, list | tuple) or len(outcomes) != len(group):
            what = (
                f"{len(outcomes)} rewards" if isinstance(outcomes, list | tuple) else type(outcomes).__name__
            )
            raise HookError(
                f"{hook_name(hook)} returned {what} for a group of {len(group)} samples",
                where=hook_place(hook),
                why="with --group-rm it gets the samples of a prompt and returns a list of their rewards",
            )
        return list(outcomes)

    async def judge(samples: Sequence[Sample]) -> list[Outcome]:
        groups = [list(group) for _, group in groupby(samples, key=lambda sample: sample.group_index)]
        judged = await asyncio.gather(*(judge_group(group) for group in groups))
        return [outcome for outcomes in judged for outcome in outcomes]

    return judge


def _failed(error: HookError, samples: list[Sample], on_error: ErrorPolicy) -> list[Outcome]:
    if on_error == "raise":
        raise error
    for sample in samples:
        sample.status = SampleStatus.FAILED
    return [RewardFailure("exception", f"{error.where}: {error.why}")] * len(samples)
