"""Several engines behind one client: spread by group, lost engines replaced, every call answered once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import Any

import numpy as np
import pytest

from miles.errors import ExitCode, MilesError, RunError, Unavailable
from miles.orchestration import seats
from miles.orchestration.engine_pool import Answer, EnginePool
from miles.orchestration.seats import Seat
from miles.orchestration.worker_loss import WorkerLost
from miles.rollout.engine import (
    EngineHealth,
    GenerateOutput,
    GenerateRequest,
    RequestRefused,
    SamplingParams,
)


class ScriptedEngine:
    """Stands in for an engine process: answers with the sample key, and dies after so many calls."""

    def __init__(self, dies_after: int | None = None, hangs: bool = False) -> None:
        self.dies_after, self.hangs = dies_after, hangs
        self.batches: list[list[int]] = []
        """Sample keys of every batch of calls that was taken up."""
        self.answered: list[int] = []
        self.loaded: list[Any] = []
        self.killed = asyncio.Event()
        self.checks = 0

    async def generate(self, calls: Sequence[Sequence[GenerateRequest]]) -> AsyncIterator[tuple[int, Answer]]:
        self.batches.append([call[0].sample_key for call in calls])
        for index, call in enumerate(calls):
            await asyncio.sleep(0)
            if self.hangs:
                await self.killed.wait()
            if self.hangs or len(self.answered) == self.dies_after:
                raise WorkerLost("engine", "its process died")
            self.answered.append(call[0].sample_key)
            yield index, self._answer(call)

    def _answer(self, call: Sequence[GenerateRequest]) -> Answer:
        if call[0].sample_key < 0:
            return RequestRefused("no such request")
        return [output(request.sample_key) for request in call]

    async def abort(self, groups: Collection[int] | None) -> int:
        return 1

    async def load(self, packet: Any) -> None:
        if self.dies_after == 0:
            raise WorkerLost("engine", "its process died")
        self.loaded.append(packet)

    async def health(self) -> EngineHealth:
        self.checks += 1
        if self.hangs:
            await self.killed.wait()
        return EngineHealth(ok=True, reason="", weight_version=1, running=0, waiting=0, paused=False)

    async def metrics(self) -> dict[str, float]:
        return {}

    def kill(self) -> None:
        self.killed.set()


def output(key: int) -> GenerateOutput:
    return GenerateOutput(
        output_ids=[key],
        log_probs=np.zeros(1, np.float32),
        routed_experts=None,
        finish_reason="stop",
        weight_versions=[(0, 0)],
        cached_tokens=0,
    )


def group(number: int, size: int = 1) -> list[GenerateRequest]:
    sampling = SamplingParams(max_new_tokens=1)
    return [
        GenerateRequest(input_ids=[1], sampling=sampling, sample_key=number * 100 + i, group=number)
        for i in range(size)
    ]


class Crew:
    """Seats filled from a list of engines, in order, some of which do not start; the events they report."""

    def __init__(self, *engines: ScriptedEngine | MilesError, seats: int, max_restarts: int = 3) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        waiting = iter(engines)

        async def launch() -> ScriptedEngine:
            engine = next(waiting)
            if isinstance(engine, MilesError):
                raise engine
            return engine

        self.seats = [
            Seat(f"engine-{i}", launch, max_restarts, lambda kind, **f: self.events.append((kind, f)))
            for i in range(seats)
        ]

    async def pool(self) -> EnginePool:
        for seat in self.seats:
            await seat.fill()
        return EnginePool(self.seats)

    def kinds(self) -> Counter[str]:
        return Counter(kind for kind, _ in self.events)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were paused for; none of them pass."""
    taken: list[float] = []

    async def pause(self: Seat[Any], seconds: float) -> None:
        taken.append(seconds)

    monkeypatch.setattr(Seat, "_pause", pause)
    return taken


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scenario(), 300)

    asyncio.run(bounded())


def test_groups_go_to_the_engine_with_the_least_to_do_and_arrive_together() -> None:
    async def scenario() -> None:
        first, second = ScriptedEngine(), ScriptedEngine()
        pool = await Crew(first, second, seats=2).pool()
        answers = await asyncio.gather(*(pool.generate(group(n)) for n in range(4)))
        assert [answer[0].output_ids for answer in answers] == [[0], [100], [200], [300]]
        assert first.batches == [[0, 200]] and second.batches == [[100, 300]]

    run(scenario)


def test_a_group_that_comes_back_goes_to_the_engine_that_knows_its_prompt() -> None:
    async def scenario() -> None:
        first, second = ScriptedEngine(), ScriptedEngine()
        pool = await Crew(first, second, seats=2).pool()
        await asyncio.gather(pool.generate(group(0)), pool.generate(group(1)))
        await pool.generate(group(1))
        assert [len(first.batches), len(second.batches)] == [1, 2]

    run(scenario)


def test_what_a_lost_engine_left_unanswered_is_asked_of_its_successor_only() -> None:
    async def scenario() -> None:
        dying, successor = ScriptedEngine(dies_after=2), ScriptedEngine()
        crew = Crew(dying, successor, seats=1)
        pool = await crew.pool()
        answers = await asyncio.gather(*(pool.generate(group(n)) for n in range(5)))
        assert [answer[0].output_ids[0] for answer in answers] == [0, 100, 200, 300, 400]
        assert dying.answered == [0, 100] and successor.answered == [200, 300, 400]
        assert crew.events[0] == ("worker_dead", {"worker": "engine-0", "reason": "its process died"})
        assert crew.events[1] == ("restart", {"worker": "engine-0", "restarts": 1})

    run(scenario)


def test_an_engine_that_is_lost_once_too_often_fails_its_callers() -> None:
    async def scenario() -> None:
        crew = Crew(*(ScriptedEngine(dies_after=0) for _ in range(3)), seats=1, max_restarts=2)
        pool = await crew.pool()
        with pytest.raises(RunError, match="engine-0 was lost 3 times"):
            await pool.generate(group(0))
        assert crew.kinds() == {"worker_dead": 3, "restart": 2}

    run(scenario)


def test_a_refused_request_fails_its_caller_and_nobody_else() -> None:
    async def scenario() -> None:
        pool = await Crew(ScriptedEngine(), seats=1).pool()
        bad = [
            GenerateRequest(input_ids=[1], sampling=SamplingParams(max_new_tokens=1), sample_key=-1, group=9)
        ]
        refused, answered = await asyncio.gather(
            pool.generate(bad), pool.generate(group(1)), return_exceptions=True
        )
        assert isinstance(refused, MilesError) and isinstance(answered, list)

    run(scenario)


def test_every_engine_has_new_weights_before_the_hand_over_ends_even_one_lost_meanwhile() -> None:
    async def scenario() -> None:
        healthy, dying, successor = ScriptedEngine(), ScriptedEngine(dies_after=0), ScriptedEngine()
        pool = await Crew(healthy, dying, successor, seats=2).pool()
        await pool.receive("version 1")
        assert healthy.loaded == ["version 1"] and successor.loaded == ["version 1"]

    run(scenario)


def test_an_engine_that_does_not_answer_is_ended_and_its_groups_drawn_again() -> None:
    async def scenario() -> None:
        hanging, successor = ScriptedEngine(hangs=True), ScriptedEngine()
        crew = Crew(hanging, successor, seats=1)
        pool = await crew.pool()
        watch = asyncio.create_task(pool.check_health(interval=60, timeout=0.05, first_wait=0))
        (answer,) = await pool.generate(group(7))
        watch.cancel()
        assert answer.output_ids == [700] and crew.kinds() == {"worker_dead": 1, "restart": 1}

    run(scenario)


NOT_STARTED = Unavailable("the server did not start", "server-0.log", "out of memory", "look there")


@pytest.mark.parametrize("failed", [NOT_STARTED, WorkerLost("engine-0", "out of memory")])
def test_a_start_that_fails_is_told_and_tried_again_after_a_pause(
    failed: MilesError, pauses: list[float]
) -> None:
    async def scenario() -> None:
        dead, successor = ScriptedEngine(dies_after=0), ScriptedEngine()
        crew = Crew(dead, failed, failed, successor, seats=1)
        (answer,) = await (await crew.pool()).generate(group(3))
        assert answer.output_ids == [300]
        assert [kind for kind, _ in crew.events] == ["worker_dead", *["restart_failed"] * 2, "restart"]
        told = [fields for kind, fields in crew.events if kind == "restart_failed"]
        assert all("out of memory" in fields["reason"] for fields in told)
        assert [fields["restarts_left"] for fields in told] == [2, 1]
        assert pauses == [seats.START_PAUSE_S, 2 * seats.START_PAUSE_S]

    run(scenario)


def test_a_seat_that_stays_empty_ends_the_health_checks_and_every_caller(pauses: list[float]) -> None:
    """Not only the one that found it empty: others wait for the same engine."""

    async def scenario() -> None:
        hanging, other = ScriptedEngine(hangs=True), ScriptedEngine()
        crew = Crew(hanging, other, *[NOT_STARTED] * 3, seats=2)
        pool = await crew.pool()
        asked = asyncio.create_task(pool.generate(group(0)))
        with pytest.raises(Unavailable, match="engine-0 was lost, and no other") as raised:
            await pool.check_health(interval=60, timeout=0.05, first_wait=0)
        assert "server-0.log" in raised.value.why and "out of memory" in raised.value.why
        assert raised.value.exit_code is ExitCode.UNAVAILABLE
        with pytest.raises(Unavailable):
            await asked
        assert crew.kinds() == {"worker_dead": 1, "restart_failed": 3}

    run(scenario)


def test_a_start_that_cannot_be_mended_by_another_is_not_tried_again(pauses: list[float]) -> None:
    async def scenario() -> None:
        crew = Crew(ScriptedEngine(dies_after=0), RunError("the cluster has no room"), seats=1)
        pool = await crew.pool()
        with pytest.raises(RunError, match="no room"):
            await pool.generate(group(0))
        assert crew.kinds() == {"worker_dead": 1, "restart_failed": 1}

    run(scenario)


def test_health_checks_of_one_engine_do_not_wait_for_the_start_of_another() -> None:
    async def scenario() -> None:
        first, second = ScriptedEngine(hangs=True), ScriptedEngine()
        starting = asyncio.Event()

        async def launch() -> ScriptedEngine:
            starting.set()
            await asyncio.sleep(3600)
            raise AssertionError

        engines = iter([first, second])

        async def fill() -> ScriptedEngine:
            return next(engines, None) or await launch()

        both = [Seat(f"engine-{i}", fill, 3, lambda kind, **fields: None) for i in range(2)]
        for seat in both:
            await seat.fill()
        pool = EnginePool(both)
        watch = asyncio.create_task(pool.check_health(interval=0.01, timeout=0.05, first_wait=0))
        await starting.wait()
        second.checks = 0
        while second.checks < 2:
            await asyncio.sleep(0.01)
        watch.cancel()

    run(scenario)


class Replacing:
    """Two engines, the first of which dies while it draws; its successor starts when it is let."""

    def __init__(self) -> None:
        self.dying, self.other, self.successor = (
            ScriptedEngine(hangs=True),
            ScriptedEngine(),
            ScriptedEngine(),
        )
        self.may_start = asyncio.Event()
        waiting = iter([self.dying, self.other, self.successor])

        async def launch() -> ScriptedEngine:
            engine = next(waiting)
            if engine is self.successor:
                await self.may_start.wait()
            return engine

        self.seats = [Seat(f"engine-{i}", launch, 3, lambda kind, **fields: None) for i in range(2)]

    async def pool(self) -> EnginePool:
        for seat in self.seats:
            await seat.fill()
        return EnginePool(self.seats)

    async def lose(self) -> None:
        while not self.dying.batches:
            await asyncio.sleep(0)
        self.dying.kill()
        while not self.seats[0].vacant:
            await asyncio.sleep(0)


def test_what_is_aborted_does_not_wait_for_a_lost_engine_s_successor_which_is_not_asked() -> None:
    async def scenario() -> None:
        engines = Replacing()
        pool = await engines.pool()
        sizes = {0: 2, 1: 4, 2: 2}
        asked = [asyncio.create_task(pool.generate(group(n, size))) for n, size in sizes.items()]
        await engines.lose()
        assert await pool.abort({0}) == 2 + 1, "two of the lost engine's, one that the other says"
        cut = await asked[0]
        assert [(output.output_ids, output.finish_reason) for output in cut] == [([], "abort")] * 2
        engines.may_start.set()
        assert [output.output_ids for output in await asked[2]] == [[200], [201]]
        assert engines.successor.batches == [[200]]
        await asked[1]

    run(scenario)


def test_new_groups_go_to_an_engine_that_is_there() -> None:
    async def scenario() -> None:
        engines = Replacing()
        pool = await engines.pool()
        asked = asyncio.create_task(pool.generate(group(0)))
        await engines.lose()
        for number in (7, 8, 0):
            assert [output.output_ids for output in await pool.generate(group(number))] == [[number * 100]]
        assert engines.other.batches == [[700], [800], [0]]
        engines.may_start.set()
        await asked

    run(scenario)


def test_an_attempt_that_ends_in_a_pause_starts_no_engine() -> None:
    async def scenario() -> None:
        crew = Crew(ScriptedEngine(), NOT_STARTED, ScriptedEngine(), seats=1)
        await crew.pool()
        (seat,) = crew.seats
        lost = WorkerLost("engine-0", "killed")
        replacing = asyncio.create_task(seat.replace(seat.worker, lost))
        while "restart_failed" not in crew.kinds():
            await asyncio.sleep(0)
        seat.dismiss()
        with pytest.raises(WorkerLost):
            await replacing
        assert crew.kinds() == {"worker_dead": 1, "restart_failed": 1}

    run(scenario)


def test_two_callers_that_see_one_death_replace_the_worker_once() -> None:
    async def scenario() -> None:
        crew = Crew(ScriptedEngine(), ScriptedEngine(), seats=1)
        await crew.pool()
        (seat,) = crew.seats
        dead, lost = seat.worker, WorkerLost("engine-0", "gone")
        await asyncio.gather(seat.replace(dead, lost), seat.replace(dead, lost))
        assert crew.kinds() == {"worker_dead": 1, "restart": 1}

    run(scenario)


def test_the_end_of_an_attempt_brings_no_engine_back() -> None:
    """Requests are in flight when everything is ended; their loss is no reason to start another engine."""

    async def scenario() -> None:
        crew = Crew(ScriptedEngine(hangs=True), seats=1)
        pool = await crew.pool()
        asked = asyncio.create_task(pool.generate(group(0)))
        await asyncio.sleep(0)
        crew.seats[0].dismiss()
        with pytest.raises(WorkerLost):
            await asked
        assert crew.events == []

    run(scenario)


def test_an_engine_that_was_being_started_when_the_attempt_ended_is_ended_too() -> None:
    async def scenario() -> None:
        starting, go_on = asyncio.Event(), asyncio.Event()
        engines = [ScriptedEngine(), ScriptedEngine()]
        waiting = iter(engines)

        async def launch() -> ScriptedEngine:
            engine = next(waiting)
            if engine is engines[1]:
                starting.set()
                await go_on.wait()
            return engine

        seat = Seat("engine-0", launch, 3, lambda kind, **fields: None)
        await seat.fill()
        replacing = asyncio.create_task(seat.replace(engines[0], WorkerLost("engine-0", "killed")))
        await starting.wait()
        seat.dismiss()
        go_on.set()
        with pytest.raises(WorkerLost):
            await replacing
        assert engines[1].killed.is_set()

    run(scenario)
