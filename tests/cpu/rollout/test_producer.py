"""The producer under a fake engine whose groups finish when the test says so, under the weights it says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from miles.data.sample import Sample, SampleStatus
from miles.errors import RunError
from miles.rollout.collect import Generate, Group
from miles.rollout.filters import DynamicFilter
from miles.rollout.producer import Producer, Taken
from miles.rollout.staleness import FlowSettings, room

B = 2


def settings(**changes: Any) -> FlowSettings:
    return replace(FlowSettings(rollout_batch_size=B, max_in_flight=4, capacity=6), **changes)


@dataclass
class World:
    """Prompts and engines. `drawn`: group indices in order; `running`: futures of groups in flight."""

    drawn: list[int] = field(default_factory=list)
    back: list[Group] = field(default_factory=list)
    running: dict[int, asyncio.Future[Group]] = field(default_factory=dict)
    began_for: dict[int, int] = field(default_factory=dict)
    fresh: int = 0
    scored: int = 0
    slow_judge: set[int] = field(default_factory=set)

    def draw(self, count: int) -> list[Group]:
        groups = []
        for _ in range(count):
            if self.back:
                groups.append(self.back.pop(0))
            else:
                groups.append([Sample("p", tokens=[1, 2], group_index=self.fresh, index=self.fresh)])
                self.fresh += 1
        self.drawn += [group[0].group_index or 0 for group in groups]
        return groups

    def put_back(self, groups: Sequence[Group]) -> None:
        self.back += groups

    def generate_for(self, step: int) -> Generate:
        async def generate(group: Sequence[Sample]) -> Group:
            if group[0].status is not SampleStatus.PENDING:
                return list(group)
            index = group[0].group_index or 0
            self.began_for[index] = step
            self.running[index] = asyncio.get_running_loop().create_future()
            return await self.running[index]

        return generate

    async def score(self, samples: Sequence[Sample]) -> list[float]:
        self.scored += len(samples)
        if samples[0].group_index in self.slow_judge:
            await asyncio.sleep(600)
        return [1.0 for _ in samples]

    async def abort(self, groups: Collection[int] | None = None) -> int:
        for index in [index for index in self.running if groups is None or index in groups]:
            self.finish(index, 0, SampleStatus.ABORTED)
        return 0

    def finish(self, index: int, version: int, status: SampleStatus = SampleStatus.COMPLETED) -> None:
        """Answer a group by weights `version`."""
        self.running.pop(index).set_result([answered(index, version, status)])


def answered(index: int, version: int, status: SampleStatus = SampleStatus.COMPLETED) -> Sample:
    return Sample(
        "p",
        tokens=[1, 2, 3],
        response_length=1,
        response="r",
        status=status,
        rollout_log_probs=np.zeros(1, dtype=np.float32),
        weight_versions=[(version, 0)],
        group_index=index,
        index=index,
    )


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


Story = Callable[[World, Producer], Awaitable[None]]


async def first_step(world: World, producer: Producer) -> None:
    """Step 1 takes the groups 0 and 1, and its weights are served."""
    world.finish(0, 0)
    world.finish(1, 0)
    await producer.take(1)
    producer.serve(1)
    await settle()


def tell(
    story: Story, *, steps: int = 9, dynamic_filter: DynamicFilter | None = None, **changes: Any
) -> World:
    """Run a story between start and stop; nobody is left sampling behind it."""

    async def run() -> World:
        world = World()
        producer = Producer(
            world,  # type: ignore[arg-type]
            world.draw,
            world.put_back,
            world.generate_for,
            world.score,
            settings(**changes),
            dynamic_filter,
        )
        producer.serve(0)
        producer.start(1, steps)
        await settle()
        try:
            await story(world, producer)
        finally:
            await producer.stop(politely=True)
        assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        return world

    return asyncio.run(run())


def indices(taken: Taken) -> list[int | None]:
    return [group[0].group_index for group in taken.groups]


def stale(taken: Taken, name: str) -> float:
    return taken.metrics[f"rollout/fully_async/{name}"]


def test_groups_stay_in_flight_while_the_trainer_learns() -> None:
    async def story(world: World, producer: Producer) -> None:
        assert world.drawn == [0, 1, 2, 3], "as many as may be in flight"
        world.finish(3, 0)
        world.finish(1, 0)
        taken = await producer.take(1)
        assert indices(taken) == [1, 3], "whoever is finished, in the order of their index"
        await settle()
        assert sorted(world.running) == [0, 2, 4, 5], "the trainer learns, and others have begun"
        world.finish(0, 0)
        world.finish(4, 0)
        producer.serve(1)
        taken = await producer.take(2)
        assert indices(taken) == [0, 4]
        assert stale(taken, "avg_staleness") == 1 and stale(taken, "stale_ratio") == 1
        assert (world.began_for[5], world.began_for[6]) == (1, 2), (
            "random numbers of the step that it begins for"
        )

    assert tell(story).scored == 4


def test_finished_groups_are_bounded_and_the_oldest_go_first() -> None:
    async def story(world: World, producer: Producer) -> None:
        for index, version in ((0, 1), (1, 1), (2, 0), (3, 0)):
            world.finish(index, version)
        await settle()
        assert sorted(world.running) == [4, 5], "six in flight or finished, and no more"
        for index in (4, 5):
            world.finish(index, 1)
        await settle()
        assert not world.running
        assert indices(await producer.take(1)) == [2, 3]
        await settle()
        assert len(world.running) == B

    tell(story)


def test_nothing_begins_that_the_bound_would_forbid() -> None:
    async def story(world: World, producer: Producer) -> None:
        assert world.drawn == [0, 1], "at 0 the next batch and nothing else"
        for index in (0, 1):
            world.finish(index, 0)
        taken = await producer.take(1)
        await settle()
        assert not world.running, "while the trainer learns nothing may begin"
        producer.serve(1)
        await settle()
        assert sorted(world.running) == [2, 3]
        assert stale(taken, "max_staleness") == 0

    tell(story, max_staleness=0)


@pytest.mark.parametrize(
    ("bound", "waiting", "version", "expected"),
    [(1, 0, 4, 4), (1, 3, 4, 1), (1, 2, 3, 0), (3, 2, 2, 2), (None, 2, 0, 4), (0, 2, 4, 0)],
)
def test_the_room_for_new_work(bound: int | None, waiting: int, version: int, expected: int) -> None:
    """Step 5 is next. What begins as the w-th waiting group is trained on in step 5 + w // B."""
    limits = settings(max_staleness=bound)
    found = room(limits, in_flight=0, waiting=waiting, step=5, last_step=20, version=version)
    assert found == expected


def test_what_grew_too_old_is_not_trained_on_and_its_prompt_comes_back() -> None:
    async def story(world: World, producer: Producer) -> None:
        await first_step(world, producer)
        assert sorted(world.running) == [2, 3, 4, 5]
        world.finish(4, 1)
        world.finish(5, 1)
        taken = await producer.take(2)
        assert indices(taken) == [4, 5]
        # 2 and 3 began under version 0: in step 3 they would be two versions old.
        producer.serve(2)
        await settle()
        assert world.drawn[6:8] == [2, 3], "prompts that went back are first"
        world.finish(2, 2)
        world.finish(3, 2)
        taken = await producer.take(3)
        assert indices(taken) == [2, 3]
        assert stale(taken, "stale_groups_filtered") == stale(taken, "returned_groups") == 2
        assert stale(taken, "max_staleness") == 0

    tell(story, max_staleness=1)


def test_a_group_that_grew_too_old_is_not_waited_for_at_its_judge() -> None:
    async def story(world: World, producer: Producer) -> None:
        world.slow_judge = {2}
        for index in (0, 1, 2):
            world.finish(index, 0)
            await settle()
        await producer.take(1)
        producer.serve(1)
        await settle()
        for index in (4, 5):
            world.finish(index, 1)
        await asyncio.wait_for(producer.take(2), 300)
        producer.serve(2)
        await settle()
        assert world.drawn.count(2) == 2

    tell(story, max_staleness=1)


def test_a_finished_group_that_waits_too_long_goes_back_whole() -> None:
    async def story(world: World, producer: Producer) -> None:
        await first_step(world, producer)
        for index in (2, 3, 4, 5):
            world.finish(index, 0)
        assert indices(await producer.take(2)) == [2, 3]
        producer.serve(2)
        await settle()
        assert world.drawn[-4:-2] == [4, 5], "too old for step 3: drawn again"
        assert [world.began_for[index] for index in (4, 5)] == [3, 3], "under other random numbers"

    tell(story, max_staleness=1)


def test_a_dropped_group_is_gone_with_its_prompt() -> None:
    async def story(world: World, producer: Producer) -> None:
        await first_step(world, producer)
        for index in (4, 5):
            world.finish(index, 1)
        taken = await producer.take(2)
        await settle()
        assert indices(taken) == [4, 5] and not world.back
        assert world.drawn.count(2) == world.drawn.count(3) == 1

    tell(story, max_staleness=1, retry_stale=False)


def test_a_group_that_the_engine_cut_off_goes_back() -> None:
    async def story(world: World, producer: Producer) -> None:
        world.finish(0, 0, SampleStatus.ABORTED)
        await settle()
        assert world.drawn == [0, 1, 2, 3, 0]
        for index in (0, 1):
            world.finish(index, 0)
        taken = await producer.take(1)
        assert indices(taken) == [0, 1] and stale(taken, "aborted_groups_filtered") == 1

    tell(story)


def test_a_checkpoint_holds_prompts_in_flight_and_finished_groups() -> None:
    async def story(world: World, producer: Producer) -> None:
        for index in (1, 2):
            world.finish(index, 0)
        await settle()
        kept = {group[0].group_index: group[0] for group in producer.waiting()}
        assert {i: s.status for i, s in kept.items() if i in (1, 2)} == {
            1: SampleStatus.COMPLETED,
            2: SampleStatus.COMPLETED,
        }
        assert [kept[i].status for i in (0, 3, 4, 5)] == [SampleStatus.PENDING] * 4
        assert all(kept[i].tokens == [1, 2] for i in (0, 3, 4, 5))
        await producer.take(1)
        assert {g[0].group_index for g in producer.waiting()} == {0, 3, 4, 5}, "what was taken is not kept"

    tell(story)


def test_a_finished_group_of_a_checkpoint_is_taken_without_another_request() -> None:
    async def run() -> None:
        world = World(
            back=[[replace(answered(7, 4), reward=1.0)], [replace(answered(8, 1), reward=1.0)]], fresh=9
        )
        producer = Producer(
            world,  # type: ignore[arg-type]
            world.draw,
            world.put_back,
            world.generate_for,
            world.score,
            settings(max_staleness=1),
        )
        producer.serve(5)
        producer.start(6, 9)
        await settle()
        assert 7 not in world.running and 8 in world.running, "8 is four versions old: its prompt is drawn"
        world.finish(8, 5)
        taken = await producer.take(6)
        assert indices(taken) == [7, 8] and world.scored == 1
        await producer.stop(politely=True)

    asyncio.run(run())


def test_nothing_is_sampled_that_nobody_learns_from() -> None:
    async def story(world: World, producer: Producer) -> None:
        assert world.drawn == [0, 1]
        for index in (0, 1):
            world.finish(index, 0)
        await producer.take(1)
        await settle()
        assert not world.running

    tell(story, steps=1)


def test_a_filter_that_keeps_nothing_ends_the_run() -> None:
    async def story(world: World, producer: Producer) -> None:
        async def answer() -> None:
            while True:
                for index in list(world.running):
                    world.finish(index, 0)
                await asyncio.sleep(0)

        answering = asyncio.create_task(answer())
        with pytest.raises(RunError, match="dull: "):
            await producer.take(1)
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)

    tell(story, dynamic_filter=lambda group: "dull")


def test_what_breaks_the_sampling_is_raised_where_the_batch_is_awaited() -> None:
    async def story(world: World, producer: Producer) -> None:
        world.running.pop(1).set_exception(RunError("the engine is gone"))
        for _ in range(2):
            with pytest.raises(RunError, match="the engine is gone"):
                await producer.take(1)

    tell(story)


def test_idleness_is_the_time_without_a_group_in_flight() -> None:
    async def story(world: World, producer: Producer) -> None:
        for index in (0, 1):
            world.finish(index, 0)
        began = time.perf_counter()
        await producer.take(1)
        slept = time.perf_counter()
        await asyncio.sleep(0.02)
        idle = time.perf_counter() - slept
        producer.serve(1)
        await settle()
        for index in (2, 3):
            world.finish(index, 1)
        taken = await producer.take(2)
        assert idle / (time.perf_counter() - began) < stale(taken, "engine_idle_ratio") < 1

    tell(story, max_staleness=0)


def test_a_step_that_was_given_other_samples_is_passed_over() -> None:
    """A run that was one step ahead trains on that rollout first."""

    async def story(world: World, producer: Producer) -> None:
        for index in (0, 1):
            world.finish(index, 0)
        producer.serve(1)
        taken = await producer.take(2)
        assert indices(taken) == [0, 1] and stale(taken, "max_staleness") == 1

    tell(story, max_staleness=1)
