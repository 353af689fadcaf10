"""The collector: prompt groups in, scored groups worth training on out, with over-sampling and a filter."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from miles.data.sample import Sample
from miles.errors import RunError
from miles.rollout.engine import GenerationClient
from miles.rollout.filters import DynamicFilter, check_no_aborted
from miles.rollout.statistics import rollout_metrics

Group = list[Sample]
Draw = Callable[[int], Sequence[Group]]
"""The next so many prompt groups, in the order in which to begin them."""
Generate = Callable[[Sequence[Sample]], Awaitable[Group]]
Score = Callable[[Sequence[Sample]], Awaitable[Sequence[float | dict[str, Any] | None]]]
"""One reward per sample of a complete group; None where none could be computed."""

ABORT_AGAIN_S = 0.05
"""Seconds between two aborts of what should end."""

GIVE_UP_FACTOR = 100
"""A filter that has rejected this many times the wanted number of groups is not going to be satisfied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectSettings:
    """`rollout_batch_size` groups are wanted; `over_sampling_batch_size` are drawn at a time while some lack.

    The filter says why a scored group is dropped. Groups with an aborted member, and those that are complete
    when the batch is full, are dropped, or kept for the next rollout where `keep_unused` is set.
    """

    rollout_batch_size: int
    over_sampling_batch_size: int
    dynamic_filter: DynamicFilter | None = None
    reward_key: str | None = None
    keep_unused: bool = False

    def __post_init__(self) -> None:
        assert 1 <= self.rollout_batch_size <= self.over_sampling_batch_size


@dataclass(frozen=True, slots=True)
class Rollout:
    """Accepted groups, their metrics, how many groups were drawn for them, and what the next rollout goes on
    with; groups are ordered by group index.
    """

    groups: list[Group]
    metrics: dict[str, float]
    groups_drawn: int
    unused: list[Group] = field(default_factory=list)


@dataclass(slots=True)
class _Sorted:
    """Where answered groups go."""

    accepted: list[Group] = field(default_factory=list)
    unused: list[Group] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


async def collect(
    engine: GenerationClient, draw: Draw, generate: Generate, score: Score, settings: CollectSettings
) -> Rollout:
    """Fill one rollout batch; what is still in flight when it is full is aborted, and kept where the settings
    say so.

    Raises:
        RunError: the dynamic filter keeps dropping everything.
    """
    groups = _Sorted()
    in_flight: dict[asyncio.Task[Group], int | None] = {}
    groups_drawn = 0
    try:
        while len(groups.accepted) < settings.rollout_batch_size:
            if len(groups.accepted) + len(in_flight) < settings.rollout_batch_size:
                _refuse_endless(settings, groups_drawn, groups.dropped)
                drawn = draw(settings.over_sampling_batch_size)
                groups_drawn += len(drawn)
                for group in drawn:
                    in_flight[asyncio.create_task(answer_group(group, generate, score))] = group[
                        0
                    ].group_index
            done, _ = await asyncio.wait(in_flight, return_when=asyncio.FIRST_COMPLETED)
            # A set has no order of its own; the lower group index goes first.
            for task in sorted(done, key=lambda task: in_flight[task] or 0):
                # Where one fails, the others are still in flight: `_abandon` looks at what became of them.
                _sort_out(task.result(), settings, groups)
                del in_flight[task]
    finally:
        cut_off = await _abandon(engine, in_flight)
    for answer in cut_off if settings.keep_unused else ():
        if isinstance(answer, BaseException):
            raise answer
        _sort_out(answer, settings, groups)
    for kind in (groups.accepted, groups.unused):
        kind.sort(key=lambda group: group[0].group_index or 0)
    metrics = rollout_metrics(groups.accepted, settings.reward_key)
    drops = sorted(groups.dropped.items())
    metrics |= {f"rollout/dynamic_filter/drop_{reason}": float(count) for reason, count in drops}
    if settings.keep_unused:
        metrics["rollout/kept_groups"] = float(len(groups.unused))
    return Rollout(groups.accepted, metrics, groups_drawn, groups.unused)


async def answer_group(group: Group, generate: Generate, score: Score) -> Group:
    """Generate and score one group; a group with an aborted member, or with all of its rewards, is not
    scored.
    """
    filled = await generate(group)
    if check_no_aborted(filled) is None and any(sample.reward is None for sample in filled):
        rewards = await score(filled)
        for sample, reward in zip(filled, rewards, strict=True):
            sample.reward = reward
    return filled


def _sort_out(group: Group, settings: CollectSettings, groups: _Sorted) -> None:
    """Accept the group, count why it is dropped, or leave it for the next rollout or out of any."""
    reason = check_no_aborted(group)
    if reason is not None and settings.keep_unused:
        groups.unused.append(group)
        return
    if reason is None and settings.dynamic_filter is not None:
        reason = settings.dynamic_filter(group)
    if reason is not None:
        groups.dropped[reason] += 1
    elif len(groups.accepted) < settings.rollout_batch_size:
        groups.accepted.append(group)
    elif settings.keep_unused:
        groups.unused.append(group)


async def _abandon(
    engine: GenerationClient, in_flight: dict[asyncio.Task[Group], int | None]
) -> list[Group | BaseException]:
    """Abort what is left and wait for it, so that nothing of this rollout runs on into the next one; returns
    what came back of it.

    A group between two turns has no request to abort, and makes one later: aborting is repeated.
    """
    left = set(in_flight)
    try:
        while left:
            await engine.abort({index for task in left if (index := in_flight[task]) is not None})
            _, left = await asyncio.wait(left, timeout=ABORT_AGAIN_S)
    finally:
        # An engine that cannot even be told to stop leaves nothing to wait for.
        for task in left:
            task.cancel()
        answers = await asyncio.gather(*in_flight, return_exceptions=True)
    return answers


def _refuse_endless(settings: CollectSettings, groups_drawn: int, dropped: Counter[str]) -> None:
    if groups_drawn < GIVE_UP_FACTOR * settings.rollout_batch_size:
        return
    reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.most_common())
    raise RunError(
        f"{groups_drawn} prompt groups gave fewer than {settings.rollout_batch_size} to train on",
        why=f"groups were dropped ({reasons})",
        fix="look at the rewards (miles runs show), or train without --dynamic-sampling-filter-path",
    )
