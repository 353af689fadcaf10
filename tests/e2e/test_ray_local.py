"""The ray executor on this machine: the inline run's numbers, and workers that may be killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from e2e_support import SMALL, Cli, metrics_of, summary_of

from miles.record import RunReader

pytestmark = pytest.mark.slow

ENGINE_ROUNDING = ("train/train_rollout", "rollout/rollout_log_probs")
"""Metrics of the engine's own log-probs: their last bits depend on which samples share a step."""


def assert_same_run(run: Path, other: Path) -> None:
    """Equal to the last bit, except for the rounding of the engine's log-probs."""
    ours, theirs = metrics_of(run), metrics_of(other)
    assert ours.keys() == theirs.keys()
    for step, row in theirs.items():
        rounded = {name: value for name, value in row.items() if name.startswith(ENGINE_ROUNDING)}
        assert {name: ours[step][name] for name in rounded} == pytest.approx(rounded, abs=1e-5), step
        exact = row.keys() - rounded.keys()
        assert {name: ours[step][name] for name in exact} == {name: row[name] for name in exact}, step
    drawn = [[sample["tokens"] for sample in RunReader(run).samples(step)] for step in range(1, 13)]
    assert drawn == [[s["tokens"] for s in RunReader(other).samples(step)] for step in range(1, 13)]


def pid_of(run: Path, worker: str) -> int:
    return int(json.loads((run / "heartbeat" / f"{worker}.json").read_text())["pid"])


def family_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Every living descendant of a process, Ray's servers among them."""
    return psutil.Process(process.pid).children(recursive=True)


def started(cli: Cli, step: int) -> Callable[[], bool]:
    """Whether the only run has recorded this step."""

    def reached() -> bool:
        runs = [path.parent.parent for path in cli.runs.glob("*/events/driver.jsonl")]
        return bool(runs) and (RunReader(runs[0]).history.last_step or 0) >= step

    return reached


def runtime_directory(family: list[psutil.Process]) -> Path:
    """Where the private runtime keeps its sockets and logs, as its servers were told."""
    told = re.search(r"/tmp/miles-ray-\w+", " ".join(arg for member in family for arg in member.cmdline()))
    assert told is not None
    return Path(told.group())


def test_the_metrics_are_those_of_the_inline_run_and_nothing_is_left_behind(
    cli: Cli, uninterrupted: Path
) -> None:
    process = cli.start("train", *SMALL, "--executor", "ray")
    cli.wait_until(lambda: bool(list(cli.runs.glob("*/heartbeat/trainer-0.json"))), process)
    family = family_of(process)
    assert "raylet" in {member.name() for member in family if member.is_running()}
    directory = runtime_directory(family)
    _, stderr = cli.outcome(process)
    assert process.returncode == 0, stderr
    run = cli.only_run()
    assert metrics_of(run) == metrics_of(uninterrupted)
    workers = {"trainer-0", "engine-0", "reward-0"}
    assert {path.stem for path in (run / "logs").glob("*.log")} >= workers
    assert {path.stem for path in (run / "events").glob("*.jsonl")} == workers | {"driver"}
    assert {path.stem for path in (run / "heartbeat").glob("*.json")} == workers | {"driver"}
    assert not any(member.is_running() for member in family)
    assert not any(psutil.pid_exists(pid_of(run, worker)) for worker in workers)
    assert not directory.exists()


def test_an_engine_killed_while_it_draws_costs_nothing(cli: Cli, uninterrupted: Path) -> None:
    process = cli.start("train", *SMALL, "--num-engines", "2")
    cli.wait_until(started(cli, 3), process)
    run = cli.only_run()
    first = pid_of(run, "engine-1")
    freeze_while_it_draws(cli, process, run, first)
    os.kill(first, signal.SIGKILL)
    _, stderr = cli.outcome(process)
    assert process.returncode == 0, stderr
    assert_same_run(run, uninterrupted)
    reader = RunReader(run)
    assert [event["worker"] for event in reader.events("worker_dead")] == ["engine-1"]
    assert [event["worker"] for event in reader.events("restart")] == ["engine-1"]
    assert reader.attempt == 1 and pid_of(run, "engine-1") != first
    assert "lost: engine-1" in stderr and "restarted: engine-1" in stderr


def freeze_while_it_draws(cli: Cli, process: subprocess.Popen[str], run: Path, pid: int) -> None:
    """Stop the engine's process in the middle of a rollout: the run waits there for its answers."""

    reader = RunReader(run)

    def in_rollout() -> bool:
        return {phase.name for phase in reader.history.open_phases()} == {"rollout"}

    def stuck_in_rollout() -> bool:
        # Drawing takes a small part of a step: it is waited for before the process is stopped.
        reader.poll()
        if not in_rollout():
            return False
        os.kill(pid, signal.SIGSTOP)
        reader.poll()
        # A run that does not wait for this engine moves on meanwhile.
        time.sleep(0.5)
        stuck = not reader.poll() and in_rollout()
        if not stuck:
            os.kill(pid, signal.SIGCONT)
        return stuck

    cli.wait_until(stuck_in_rollout, process)


def test_a_killed_trainer_resumes_by_itself_from_the_last_checkpoint(cli: Cli, uninterrupted: Path) -> None:
    process = cli.start("train", *SMALL, "--executor", "ray")
    cli.wait_until(started(cli, 5), process)
    run = cli.only_run()
    os.kill(pid_of(run, "trainer-0"), signal.SIGKILL)
    _, stderr = cli.outcome(process)
    assert process.returncode == 0, stderr
    assert metrics_of(run) == metrics_of(uninterrupted)
    reader = RunReader(run)
    assert reader.attempt == 2 and reader.history.resumes[2] >= 3
    assert [event["worker"] for event in reader.events("restart")] == ["trainer-0"]
    assert summary_of(run)["steps"] == 12 and summary_of(run)["attempt"] == 2


def test_a_trainer_that_may_not_be_replaced_ends_the_run_with_its_name(cli: Cli) -> None:
    process = cli.start("train", *SMALL, "--executor", "ray", "--max-worker-restarts", "0")
    cli.wait_until(started(cli, 2), process)
    run = cli.only_run()
    os.kill(pid_of(run, "trainer-0"), signal.SIGKILL)
    _, stderr = cli.outcome(process)
    assert process.returncode == 1 and "trainer-0 was lost" in stderr and "Traceback" not in stderr
    assert summary_of(run)["status"] == "failed"


def test_sigterm_saves_and_ends_every_process(cli: Cli) -> None:
    process = cli.start("train", *SMALL, "--num-rollout", "200", "--executor", "ray")
    cli.wait_until(started(cli, 4), process)
    run, family = cli.only_run(), family_of(process)
    process.send_signal(signal.SIGTERM)
    _, stderr = cli.outcome(process)
    assert process.returncode == 143, stderr
    stopped = summary_of(run)
    assert stopped["status"] == "interrupted" and 4 <= stopped["steps"] < 200
    assert (run / "checkpoints" / f"step-{stopped['steps']:06d}").is_dir()
    assert not any(member.is_running() for member in family)
    # A run may change its executor: the record and the checkpoints are the same.
    changes = ("--set", 'run.executor="inline"', "--set", f"rollout.num_rollout={stopped['steps'] + 1}")
    resumed = cli("runs", "resume", run.name, *changes)
    assert resumed.returncode == 0, resumed.stderr
    assert summary_of(run)["steps"] == stopped["steps"] + 1
