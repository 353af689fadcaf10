"""The order in which each loop samples, learns and hands weights over, and what it writes down to go on."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles.data.sample import Sample, SampleStatus
from miles.diagnosis.monitor import Monitor
from miles.errors import RunError
from miles.orchestration.checkpoints import CheckpointStore
from miles.orchestration.driver import Driver, Schedule
from miles.orchestration.loop import Loop, one_step_ahead, synchronous
from miles.orchestration.observer import SilentObserver
from miles.orchestration.rollout_worker import StepRollout
from miles.orchestration.supervisor import Supervisor
from miles.record import History, Inbox, RecordWriter, Row, RunReader, post_request
from miles.training.trainer import TrainResult


@dataclass
class World:
    """Both sides of a run, as far as a loop sees them; `log` has what happened in order."""

    log: list[str] = field(default_factory=list)
    engine_version: int = -1
    drawn: int = 0
    breaks: str = ""
    evaluates: bool = False
    held: list[list[Sample]] = field(default_factory=list)
    knobs: dict[str, float] = field(default_factory=dict)

    # The prompt source.
    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]

    def put_back(self, groups: Sequence[list[Sample]]) -> None:
        assert not groups

    # The side that samples.
    @property
    def prompts(self) -> World:
        return self

    async def evaluate(self) -> dict[str, float]:
        return {"eval/sort": 0.5} if self.evaluates else {}

    async def collect(self, step: int) -> StepRollout:
        self.drawn += 1
        version, prompt = self.engine_version, self.drawn
        self.log.append(f"sample {step} by {version}")
        await self._work("sample", step)
        assert version == self.engine_version, "weights changed under a rollout"
        sample = Sample(
            prompt=str(prompt),
            tokens=[prompt, 4, 5],
            response_length=2,
            response="x",
            reward=1.0,
            status=SampleStatus.COMPLETED,
            rollout_log_probs=np.array([-0.1, -1 / 3], dtype=np.float32),
            rollout_routed_experts=np.array([[[3, 1]], [[0, 2]]], dtype=np.int16),
            weight_versions=[(version, 0)],
        )
        self.log.append(f"sampled {step}")
        return StepRollout([sample], {"rollout/weight_version/max": float(version)})

    # The side that learns.
    async def train(self, samples: Sequence[Sample]) -> TrainResult:
        prompt = samples[0].tokens[0]
        self.log.append(f"learn {prompt}")
        await self._work("learn", prompt)
        self.log.append(f"learnt {prompt}")
        log_probs = samples[0].rollout_log_probs
        assert log_probs is not None and samples[0].rollout_routed_experts is not None
        return TrainResult({"train/loss": float(log_probs.sum())}, optimizer_steps=())

    async def set_knobs(self, patch: Mapping[str, float]) -> None:
        if "optimizer.lr" in patch and patch["optimizer.lr"] < 0:
            raise RunError("lr cannot be negative")
        self.knobs |= patch

    async def save(self, directory: Path, *, optimizer: bool = True) -> None: ...

    async def saved(self, *, wait: bool) -> bool:
        return True

    async def load(self, directory: Path) -> None: ...

    # The way between them.
    async def send(self, version: int) -> None:
        self.engine_version = version
        self.log.append(f"weights {version}")

    async def _work(self, what: str, number: int) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        if self.breaks == f"{what} {number}":
            raise RunError(f"{what} {number} broke")


async def begin(world: World, run_dir: Path, steps: int, attempt: int = 1, interval: int = 1) -> Driver:
    history = RunReader(run_dir).history if attempt > 1 else History()
    record = RecordWriter(run_dir, attempt=attempt, history=history)
    store = CheckpointStore(run_dir / "checkpoints")
    driver = Driver(
        schedule=Schedule(num_rollout=steps, save_interval=1, update_weights_interval=interval),
        rollout=world,
        trainer=world,
        weight_sync=world,
        record=record,
        inbox=Inbox(record),
        store=store,
        supervisor=Supervisor(),
        observer=SilentObserver(),
        monitor=Monitor(record, {}),
    )
    latest = store.latest()
    if latest is not None:
        await driver.restore(store.load_state(latest), latest, {})
        record.resume(driver.state.step)
    await driver.hand_over_weights(driver.state.step)
    return driver


def turn(loop: Loop, world: World, run_dir: Path, steps: int, attempt: int = 1, interval: int = 1) -> Driver:
    """Run a loop to its end, from the newest checkpoint."""

    async def run() -> Driver:
        driver = await begin(world, run_dir, steps, attempt, interval)
        with driver.record:
            await loop(driver)
        return driver

    return asyncio.run(run())


def rows_of(run_dir: Path) -> list[Row]:
    return RunReader(run_dir).rows()


def metrics_of(run_dir: Path) -> dict[int, dict[str, float]]:
    rows = rows_of(run_dir)
    return {r.step: {k: v for k, v in r.metrics.items() if not k.startswith("perf/")} for r in rows}


def test_the_synchronous_loop_samples_with_the_newest_weights_and_takes_turns(tmp_path: Path) -> None:
    world = World()
    turn(synchronous, world, tmp_path, steps=2)
    first = ["weights 0", "sample 1 by 0", "sampled 1", "learn 1", "learnt 1"]
    second = ["weights 1", "sample 2 by 1", "sampled 2", "learn 2", "learnt 2", "weights 2"]
    assert world.log == first + second


def test_one_step_ahead_samples_beside_training_and_never_under_new_weights(tmp_path: Path) -> None:
    world = World()
    turn(one_step_ahead, world, tmp_path, steps=4)
    sampled_by = [entry for entry in world.log if entry.startswith("sample ")]
    assert sampled_by == ["sample 1 by 0", "sample 2 by 0", "sample 3 by 1", "sample 4 by 2"]
    for step in (2, 3, 4):
        started, ended = world.log.index(f"learn {step - 1}"), world.log.index(f"weights {step - 1}")
        assert started < world.log.index(f"sampled {step}") < ended
        assert world.log.index(f"sample {step} by {max(step - 2, 0)}") < world.log.index(f"learnt {step - 1}")
    versions = {step: row["rollout/weight_version/max"] for step, row in metrics_of(tmp_path).items()}
    assert versions == {1: 0, 2: 0, 3: 1, 4: 2}
    assert "sample 5" not in " ".join(world.log), "nothing is sampled that nobody learns from"


@pytest.mark.parametrize(("loop", "sampled_by"), [(synchronous, "0022"), (one_step_ahead, "0002")])
def test_weights_are_sent_at_every_nth_step_alone(loop: Loop, sampled_by: str, tmp_path: Path) -> None:
    world = World(evaluates=True)
    turn(loop, world, tmp_path, steps=5, interval=2)
    assert [entry for entry in world.log if entry.startswith("weights")] == [
        "weights 0",
        "weights 2",
        "weights 4",
    ]
    metrics = metrics_of(tmp_path)
    versions = "".join(f"{metrics[step]['rollout/weight_version/max']:.0f}" for step in (1, 2, 3, 4))
    assert versions == sampled_by
    evaluated = {step: row.get("rollout/weight_version/eval") for step, row in metrics.items()}
    assert evaluated[0] == 0 and evaluated[5] == 4, "an evaluation says whose answers it judged"


def test_a_resumed_run_begins_with_the_weights_of_its_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RunError):
        turn(synchronous, World(breaks="learn 4"), tmp_path, steps=6, interval=5)
    resumed = World()
    turn(synchronous, resumed, tmp_path, steps=6, attempt=2, interval=5)
    assert resumed.log[:2] == ["weights 3", "sample 4 by 3"]
    assert resumed.log.count("weights 5") == 1 and "weights 4" not in resumed.log


def test_only_the_loop_that_runs_ahead_reports_what_the_trainer_waited(tmp_path: Path) -> None:
    for loop, reported in ((synchronous, False), (one_step_ahead, True)):
        run_dir = tmp_path / loop.__name__
        turn(loop, World(), run_dir, steps=2)
        assert all(("perf/wait_time_ratio" in row.metrics) is reported for row in rows_of(run_dir))


@pytest.mark.parametrize("loop", [synchronous, one_step_ahead])
@pytest.mark.parametrize("broken", ["sample 4", "learn 3", "learn 4"])
def test_a_run_that_broke_off_goes_on_with_the_samples_it_had(
    loop: Loop, broken: str, tmp_path: Path
) -> None:
    whole, cut = World(), World(breaks=broken)
    turn(loop, whole, tmp_path / "whole", steps=6)
    with pytest.raises(RunError, match=broken):
        turn(loop, cut, tmp_path / "cut", steps=6)
    resumed = World()
    turn(loop, resumed, tmp_path / "cut", steps=6, attempt=2)
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")
    assert resumed.log[-3:] == whole.log[-3:]
    assert resumed.drawn == whole.drawn


def test_a_failed_step_leaves_nobody_sampling(tmp_path: Path) -> None:
    world = World(breaks="learn 2")

    async def run() -> None:
        driver = await begin(world, tmp_path, steps=5)
        with driver.record, pytest.raises(RunError, match="learn 2 broke"):
            await one_step_ahead(driver)
        assert [task.get_name() for task in asyncio.all_tasks()].count("sampling-ahead") == 0

    asyncio.run(run())


def test_a_stop_ends_the_run_at_the_step_boundary_and_keeps_the_rollout_ahead(tmp_path: Path) -> None:
    world = World()

    async def run() -> None:
        driver = await begin(world, tmp_path, steps=9)
        with driver.record:
            train = driver.trainer.train

            async def stop_meanwhile(samples: Sequence[Sample]) -> TrainResult:
                if samples[0].tokens[0] == 3:
                    driver.supervisor.request_stop("stopped")
                return await train(samples)

            driver.trainer = replace(world)
            driver.trainer.train = stop_meanwhile  # type: ignore[method-assign]
            await one_step_ahead(driver)
        assert driver.state.step == 3 and driver.state.prompt_cursor == {"drawn": 4}

    asyncio.run(run())
    resumed = World()
    turn(one_step_ahead, resumed, tmp_path, steps=5, attempt=2)
    assert resumed.log[:3] == ["weights 3", "learn 4", "sample 5 by 3"]


def test_a_run_that_no_longer_runs_ahead_uses_what_was_sampled(tmp_path: Path) -> None:
    cut = World(breaks="learn 3")
    with pytest.raises(RunError):
        turn(one_step_ahead, cut, tmp_path, steps=6)
    resumed = World()
    turn(synchronous, resumed, tmp_path, steps=4, attempt=2)
    assert resumed.log[:2] == ["weights 2", "learn 3"]
    assert "sample 4 by 3" in resumed.log


STEPS = "sglang.speculative_num_steps"


def asked(run_dir: Path) -> list[tuple[str, str]]:
    """(state, why) of every answered request."""
    return [(e["state"], e.get("why", "")) for e in RunReader(run_dir).events("control")]


def test_a_live_setting_of_the_engine_is_kept_in_the_checkpoint(tmp_path: Path) -> None:
    world = World()

    async def run() -> None:
        driver = await begin(world, tmp_path, steps=1)
        with driver.record:
            post_request(tmp_path, "set", patch={STEPS: 2})
            post_request(tmp_path, "set", patch={STEPS: 1, "optimizer.lr": 0.1})
            await synchronous(driver)

    asyncio.run(run())
    assert world.knobs == {STEPS: 2}
    assert [state for state, _ in asked(tmp_path)] == ["applied", "refused"]
    later = World()
    asyncio.run(begin(later, tmp_path, steps=2, attempt=2))
    assert later.knobs == {STEPS: 2}


@pytest.mark.parametrize(("step", "told"), [(2, []), (3, [3])])
def test_a_run_that_is_resumed_between_two_updates_says_that_its_weights_are_newer(
    step: int, told: list[int], tmp_path: Path
) -> None:
    turn(synchronous, World(), tmp_path, steps=step, interval=2)
    world = World()
    turn(synchronous, world, tmp_path, steps=5, attempt=2, interval=2)
    assert [e["step"] for e in RunReader(tmp_path).events("resumed_between_updates")] == told
    sampled = [entry for entry in world.log if entry.startswith("sample ")]
    # Without the interruption: steps 3 and 4 by 2, step 5 by 4.
    whole = ["sample 3 by 2", "sample 4 by 2", "sample 5 by 4"]
    assert sampled == (whole if step == 2 else ["sample 4 by 3", "sample 5 by 4"])
