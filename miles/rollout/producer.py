"""The producer: keeps prompt groups in flight from one step to the next, and gives out finished ones.

Weights change under it. A request in flight goes on, and its tokens say which version made them.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from miles.errors import RunError
from miles.rollout.collect import GIVE_UP_FACTOR, Draw, Generate, Group, Score, answer_group
from miles.rollout.engine import GenerationClient
from miles.rollout.filters import DynamicFilter, check_no_aborted
from miles.rollout.staleness import FlowSettings, age, as_prompts, oldest_version, room

GenerateFor = Callable[[int], Generate]
"""From a step to what generates under its random numbers."""
ASYNC = "rollout/fully_async"


@dataclass(frozen=True, slots=True)
class Begun:
    """A group in flight, as it was drawn, and the weights that were served then."""

    group: Group
    version: int


@dataclass(frozen=True, slots=True)
class Finished:
    """An answered group that passed the filter; `version`: of its oldest token."""

    group: Group
    version: int


@dataclass(slots=True)
class _Counts:
    """What happened since a batch was taken."""

    begun: int = 0
    stale: int = 0
    aborted: int = 0
    returned: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    since: float = field(default_factory=time.perf_counter)
    idle: float = 0.0
    """Seconds in which no group was in flight."""


@dataclass(frozen=True, slots=True)
class Taken:
    """The batch of one step in group order, and the metrics of its age."""

    groups: list[Group]
    metrics: dict[str, float]
    seconds: float
    """Since the batch before was taken."""


class Producer:
    """Draws, generates and scores without pause between `start` and `stop`."""

    def __init__(
        self,
        engine: GenerationClient,
        draw: Draw,
        put_back: Callable[[Sequence[Group]], None],
        generate_for: GenerateFor,
        score: Score,
        settings: FlowSettings,
        dynamic_filter: DynamicFilter | None = None,
    ) -> None:
        self._engine, self._draw, self._put_back = engine, draw, put_back
        self._generate_for, self._score = generate_for, score
        self._settings, self._filter = settings, dynamic_filter
        self._version = 0
        self._step = self._last_step = 0
        self._in_flight: dict[asyncio.Task[Group], Begun] = {}
        self._answered: list[asyncio.Task[Group]] = []
        self._finished: list[Finished] = []
        self._counts = _Counts()
        self._idle_since: float | None = None
        self._news, self._sorted = asyncio.Event(), asyncio.Event()
        self._cutting_off = False
        self._pump: asyncio.Task[None] | None = None

    def serve(self, version: int) -> None:
        """The engines serve `version` from now on."""
        self._version = version
        self._news.set()

    def start(self, step: int, last_step: int) -> None:
        """Begin to sample; `step` takes the first batch."""
        assert self._pump is None, "it is started once"
        self._step, self._last_step = step, last_step
        self._counts = _Counts()
        self._pump = asyncio.create_task(self._keep_busy(), name="rollout-producer")
        self._pump.add_done_callback(lambda _: self._sorted.set())

    async def stop(self, *, politely: bool) -> None:
        """Sample no more. `politely`: the engines are told to end what is in flight; not one that is lost."""
        if self._pump is None:
            return
        self._pump.cancel()
        await asyncio.gather(self._pump, return_exceptions=True)
        if politely and self._in_flight:
            indices = (begun.group[0].group_index for begun in self._in_flight.values())
            await self._engine.abort({index for index in indices if index is not None})
        for task in self._in_flight:
            task.cancel()
        await asyncio.gather(*self._in_flight, return_exceptions=True)

    def waiting(self) -> list[Group]:
        """What a checkpoint keeps: prompts of groups in flight, and finished groups that no step took."""
        begun = [as_prompts(begun.group) for begun in self._in_flight.values()]
        return [*begun, *(finished.group for finished in self._finished)]

    async def take(self, step: int) -> Taken:
        """The batch of `step`, as soon as enough groups are finished; the oldest of them go first.

        Groups in flight that would be too old for the next step are cut off, and their prompts go back.

        Raises: RunError where everything is dropped; whatever ended the sampling.
        """
        batch = self._settings.rollout_batch_size
        self._step = step
        self._send_back_stale()
        while len(self._finished) < batch:
            assert self._pump is not None, "it was started"
            if self._pump.done():
                self._pump.result()
            self._refuse_endless()
            self._sorted.clear()
            await self._sorted.wait()
        self._finished.sort(key=lambda finished: (finished.version, finished.group[0].group_index or 0))
        taken, self._finished = self._finished[:batch], self._finished[batch:]
        metrics, seconds = self._metrics(taken), time.perf_counter() - self._counts.since
        self._counts = _Counts()
        self._step = step + 1
        self._send_back_stale()
        await self._cut_off([t for t, begun in self._in_flight.items() if self._is_stale(begun.version)])
        self._news.set()
        groups = sorted((one.group for one in taken), key=lambda group: group[0].group_index or 0)
        return Taken(groups, metrics, seconds)

    async def _keep_busy(self) -> None:
        """Begin what there is room for, and sort what was answered, for as long as this task lives."""
        while True:
            self._news.clear()
            answered, self._answered = self._answered, []
            for task in answered:
                self._sort_out(task.result(), self._in_flight.pop(task))
            self._begin_more()
            self._watch_idleness()
            if answered:
                self._sorted.set()
            await self._news.wait()

    def _begin_more(self) -> None:
        if self._cutting_off:
            return
        count = room(
            self._settings,
            in_flight=len(self._in_flight),
            waiting=len(self._in_flight) + len(self._finished),
            step=self._step,
            last_step=self._last_step,
            version=self._version,
        )
        for group in self._draw(count) if count else ():
            generate = self._generate_for(self._step)
            task = asyncio.create_task(answer_group(group, generate, self._score))
            self._in_flight[task] = Begun(group, oldest_version(group, self._version))
            self._counts.begun += 1
            task.add_done_callback(self._on_answered)

    def _on_answered(self, task: asyncio.Task[Group]) -> None:
        if not task.cancelled():
            self._answered.append(task)
            self._news.set()

    def _sort_out(self, group: Group, begun: Begun) -> None:
        """Keep a finished group, or count why it is dropped or goes back."""
        version = oldest_version(group, begun.version)
        if check_no_aborted(group) is not None:
            # Cut off for its age, or by the engine: what it has is not gone on with.
            if self._is_stale(begun.version):
                self._send_back(begun.group)
            else:
                self._counts.aborted += 1
                self._return(begun.group)
        elif self._is_stale(version):
            self._send_back(group)
        elif self._filter is not None and (reason := self._filter(group)) is not None:
            self._counts.filtered[reason] += 1
        else:
            self._finished.append(Finished(group, version))

    def _is_stale(self, version: int) -> bool:
        """Whether the step that takes the next batch cannot be given tokens of this version."""
        bound = self._settings.max_staleness
        return bound is not None and age(version, self._step) > bound

    def _send_back_stale(self) -> None:
        stale = [finished for finished in self._finished if self._is_stale(finished.version)]
        self._finished = [finished for finished in self._finished if not self._is_stale(finished.version)]
        for finished in stale:
            self._send_back(finished.group)

    def _send_back(self, group: Group) -> None:
        self._counts.stale += 1
        if self._settings.retry_stale:
            self._return(group)

    def _return(self, group: Group) -> None:
        self._counts.returned += 1
        self._put_back([as_prompts(group)])

    async def _cut_off(self, tasks: Iterable[asyncio.Task[Group]]) -> None:
        """End these groups in the engines, and wherever else they are: nobody waits for a reward of theirs.

        Nothing begins meanwhile: a prompt that went back has the same group index.
        """
        left = {task: self._in_flight[task].group[0].group_index for task in tasks}
        if not left:
            return
        self._cutting_off = True
        try:
            await self._engine.abort({index for index in left.values() if index is not None})
        finally:
            self._cutting_off = False
        for task in left:
            # One that is done by now is sorted like any other.
            if not task.done():
                task.cancel()
                self._send_back(self._in_flight.pop(task).group)

    def _watch_idleness(self) -> None:
        now = time.perf_counter()
        if self._idle_since is not None:
            self._counts.idle += now - max(self._idle_since, self._counts.since)
        self._idle_since = None if self._in_flight else now

    def _metrics(self, taken: Sequence[Finished]) -> dict[str, float]:
        """Of the batch that is taken, and of what happened since the one before."""
        self._watch_idleness()
        counts, step = self._counts, self._step
        ages = [age(oldest_version([s], one.version), step) for one in taken for s in one.group]
        metrics = {
            "avg_staleness": fmean(ages),
            "max_staleness": float(max(ages)),
            "stale_ratio": sum(old > 0 for old in ages) / len(ages),
            "stale_groups_filtered": float(counts.stale),
            "aborted_groups_filtered": float(counts.aborted),
            "returned_groups": float(counts.returned),
            "queue_size": float(len(self._finished)),
            "in_flight_groups": float(len(self._in_flight)),
            "engine_idle_ratio": counts.idle / max(time.perf_counter() - counts.since, 1e-9),
        }
        held = [age(finished.version, step) for finished in self._finished]
        if held:
            metrics |= {"buffer_avg_staleness": fmean(held), "buffer_max_staleness": float(max(held))}
        named = {f"{ASYNC}/{name}": value for name, value in metrics.items()}
        drops = sorted(counts.filtered.items())
        return named | {f"rollout/dynamic_filter/drop_{reason}": float(count) for reason, count in drops}

    def _refuse_endless(self) -> None:
        batch, counts = self._settings.rollout_batch_size, self._counts
        if counts.begun < GIVE_UP_FACTOR * batch:
            return
        reasons = counts.filtered + Counter(stale=counts.stale, aborted=counts.aborted)
        told = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
        raise RunError(
            f"{counts.begun} prompt groups gave fewer than {batch} to train on",
            why=f"groups were dropped ({told})",
            fix="look at the rewards (miles runs show); where groups are stale, raise --max-weight-staleness",
        )
