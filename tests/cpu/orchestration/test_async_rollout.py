"""The loop whose engines never pause: order of events, what a checkpoint keeps, and who was trained on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles.data.held_groups import read_groups
from miles.data.prompts import PromptFormat, PromptKeys
from miles.data.rows import parse_data_path
from miles.data.sample import Sample, SampleStatus
from miles.data.source import PromptSource, SourceSettings
from miles.diagnosis.monitor import Monitor
from miles.errors import RunError
from miles.orchestration.async_rollout import AsyncRolloutWorker
from miles.orchestration.checkpoints import CheckpointStore
from miles.orchestration.driver import HELD_GROUPS, Driver, Schedule
from miles.orchestration.loop import fully_asynchronous
from miles.orchestration.observer import SilentObserver
from miles.orchestration.supervisor import Supervisor
from miles.record import History, Inbox, RecordWriter, RunReader
from miles.rollout.collect import CollectSettings
from miles.rollout.engine import GenerateOutput, GenerateRequest, SamplingParams
from miles.rollout.generate import GenerationSettings
from miles.rollout.staleness import FlowSettings
from miles.training.trainer import TrainResult

B, PROMPTS = 2, 40


class Tokens:
    """Prompts are numbers; a number is its own token."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [int(text)]


@dataclass
class World:
    """An engine, a trainer, and the way between them. A response has as many tokens as its prompt says; one
    is made in every turn of the event loop, by the weights of that moment."""

    breaks_at: int | None = None
    version: int = -1
    trained: list[int] = field(default_factory=list)
    ages: list[int] = field(default_factory=list)
    steps: int = 0
    running: int = 0
    most_running: int = 0
    busy_in_training: int = 0
    _cut_off: set[int] = field(default_factory=set)

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateOutput]:
        if not requests:
            return []
        (request,) = requests
        assert request.group is not None
        self._cut_off.discard(request.group)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        made: list[int] = []
        wanted = 1 + request.input_ids[0] * 7 % 5
        while len(made) < wanted and request.group not in self._cut_off:
            await asyncio.sleep(0)
            made.append(self.version)
        self.running -= 1
        spans = [(v, i) for i, v in enumerate(made) if i == 0 or made[i - 1] != v]
        return [
            GenerateOutput(
                output_ids=[5] * len(made),
                log_probs=np.zeros(len(made), dtype=np.float32),
                routed_experts=None,
                finish_reason="abort" if request.group in self._cut_off else "stop",
                weight_versions=spans,
                cached_tokens=0,
            )
        ]

    async def abort(self, groups: Collection[int] | None = None) -> int:
        self._cut_off |= set(groups or ())
        return 0

    async def measurements(self) -> Sequence[Mapping[str, float]]:
        return []

    async def train(self, samples: Sequence[Sample]) -> TrainResult:
        self.steps += 1
        for _ in range(4):
            await asyncio.sleep(0)
            self.busy_in_training += self.running > 0
        if self.breaks_at is not None and self.version + 1 == self.breaks_at:
            raise RunError("the trainer broke")
        self.trained += [sample.group_index or 0 for sample in samples]
        self.ages += [self.version - (sample.oldest_weight_version or 0) for sample in samples]
        return TrainResult({"train/loss": 0.0}, optimizer_steps=())

    async def set_knobs(self, patch: Mapping[str, float]) -> None: ...

    async def update_reference(self) -> None: ...

    async def save(self, directory: Path, *, optimizer: bool = True) -> None: ...

    async def saved(self, *, wait: bool) -> bool:
        return True

    async def load(self, directory: Path) -> None: ...

    async def send(self, version: int) -> None:
        await asyncio.sleep(0)
        self.version = version


def prompts(tmp_path: Path) -> PromptSource:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"input": str(n)}) + "\n" for n in range(PROMPTS)))
    return PromptSource(
        parse_data_path(str(path)),
        PromptFormat(Tokens(), False),  # type: ignore[arg-type]
        SourceSettings(keys=PromptKeys(label=None)),
    )


async def score(samples: Sequence[Sample]) -> list[float]:
    return [1.0 for _ in samples]


def run(world: World, tmp_path: Path, steps: int, attempt: int = 1, **flow: Any) -> Path:
    """Run the loop to its end, from the newest checkpoint."""
    run_dir = tmp_path / "run"

    async def turn() -> None:
        history = RunReader(run_dir).history if attempt > 1 else History()
        record = RecordWriter(run_dir, attempt=attempt, history=history)
        rollout = AsyncRolloutWorker(
            FlowSettings(rollout_batch_size=B, max_in_flight=4, capacity=6, **flow),
            engine=world,
            prompts=prompts(tmp_path),
            score=score,
            detokenize=str,
            generation=GenerationSettings(sampling=SamplingParams(max_new_tokens=10), max_context_len=20),
            settings=CollectSettings(rollout_batch_size=B, over_sampling_batch_size=B),
        )
        driver = Driver(
            schedule=Schedule(num_rollout=steps, save_interval=1),
            rollout=rollout,
            trainer=world,
            weight_sync=world,
            record=record,
            inbox=Inbox(record),
            store=CheckpointStore(run_dir / "checkpoints"),
            supervisor=Supervisor(),
            observer=SilentObserver(),
            monitor=Monitor(record, {}),
            stream=rollout,
        )
        latest = driver.store.latest()
        if latest is not None:
            await driver.restore(driver.store.load_state(latest), latest, {})
            record.resume(driver.state.step)
        await driver.hand_over_weights(driver.state.step)
        try:
            with record:
                await fully_asynchronous(driver)
        finally:
            assert asyncio.all_tasks() == {asyncio.current_task()}, "nobody is left sampling"

    asyncio.run(turn())
    return run_dir


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_samples_are_never_older_than_the_bound(tmp_path: Path, bound: int) -> None:
    world = World()
    run_dir = run(world, tmp_path, steps=12, max_staleness=bound)
    assert len(world.ages) == 12 * B and max(world.ages) <= bound
    assert (world.busy_in_training > 0) == (bound > 0), "at 0 both sides take turns"
    rows = RunReader(run_dir).rows()
    assert max(row.metrics["rollout/fully_async/max_staleness"] for row in rows) == max(world.ages)
    assert all(0 <= row.metrics["perf/wait_time_ratio"] <= 1 for row in rows)
    assert all("perf/rollout_time" not in row.metrics for row in rows)


def test_engines_sample_while_the_trainer_learns_and_under_new_weights(tmp_path: Path) -> None:
    world = World()
    run_dir = run(world, tmp_path, steps=12)
    assert world.busy_in_training > 12
    mixed = RunReader(run_dir).series("rollout/weight_version/mixed_version_ratio").values
    assert max(mixed) > 0, "a request went on while weights changed"
    assert world.most_running <= 4


def test_a_resumed_run_loses_no_prompt_and_trains_none_twice(tmp_path: Path) -> None:
    cut, resumed = World(breaks_at=5), World()
    with pytest.raises(RunError, match="the trainer broke"):
        run(cut, tmp_path, steps=10)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000004"
    kept = read_groups(checkpoint / HELD_GROUPS)
    assert {group[0].status for group in kept} <= {SampleStatus.PENDING, SampleStatus.COMPLETED}
    run(resumed, tmp_path, steps=10, attempt=2)
    trained = cut.trained + resumed.trained
    assert len(trained) == len(set(trained)) == 10 * B
    last = read_groups(tmp_path / "run" / "checkpoints" / "step-000010" / HELD_GROUPS)
    drawn = sorted([*trained, *(group[0].group_index or 0 for group in last)])
    assert drawn == list(range(len(drawn))), "every prompt that was drawn was trained on or waits"
