"""The ray executor on this machine: the inline run's numbers, and workers that may be killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from e2e_support import RECORDING_A_STEP, SAMPLING, SMALL, Cli, metrics_of, summary_of
from preloaded import Pause

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


def command_lines(family: list[psutil.Process]) -> str:
    """What those that still run were started with."""
    words: list[str] = []
    for member in family:
        with suppress(psutil.NoSuchProcess):
            words += [member.name(), *member.cmdline()]
    return " ".join(words)


def runtime_directory(family: list[psutil.Process]) -> Path:
    """Where the private runtime keeps its sockets and logs, as its servers were told."""
    told = re.search(r"/tmp/miles-ray-\w+", command_lines(family))
    assert told is not None
    return Path(told.group())


def assert_ended(family: list[psutil.Process]) -> None:
    """None runs any more. Whoever collects what is left of them may come to it a moment later."""
    running = []
    for member in family:
        with suppress(psutil.NoSuchProcess):
            if member.is_running() and member.status() != psutil.STATUS_ZOMBIE:
                running.append(member)
    assert not running


def test_the_metrics_are_those_of_the_inline_run_and_nothing_is_left_behind(
    cli: Cli, uninterrupted: Path
) -> None:
    process = cli.start_until(Pause(*RECORDING_A_STEP, call=1), "train", *SMALL, "--executor", "ray")
    family = family_of(process)
    assert "raylet" in command_lines(family).split()
    directory = runtime_directory(family)
    process.send_signal(signal.SIGCONT)
    _, stderr = cli.outcome(process)
    assert process.returncode == 0, stderr
    run = cli.only_run()
    assert metrics_of(run) == metrics_of(uninterrupted)
    workers = {"trainer-0", "engine-0", "reward-0"}
    assert {path.stem for path in (run / "logs").glob("*.log")} >= workers
    assert {path.stem for path in (run / "events").glob("*.jsonl")} == workers | {"driver"}
    assert {path.stem for path in (run / "heartbeat").glob("*.json")} == workers | {"driver"}
    assert_ended(family)
    assert not any(psutil.pid_exists(pid_of(run, worker)) for worker in workers)
    assert not directory.exists()


def test_an_engine_killed_while_it_draws_costs_nothing(cli: Cli, uninterrupted: Path) -> None:
    process = cli.start_until(Pause(*SAMPLING, call=4), "train", *SMALL, "--num-engines", "2")
    run = cli.only_run()
    first = pid_of(run, "engine-1")
    # The run waits for what this engine has been asked.
    os.kill(first, signal.SIGSTOP)
    process.send_signal(signal.SIGCONT)
    reader = RunReader(run)

    def in_rollout() -> bool:
        reader.poll()
        return [(phase.name, phase.step) for phase in reader.history.open_phases()] == [("rollout", 4)]

    cli.wait_until(in_rollout, process)
    time.sleep(0.2)  # Its questions are on their way: lost with it, or asked of the next one.
    assert in_rollout()
    os.kill(first, signal.SIGKILL)
    _, stderr = cli.outcome(process)
    assert process.returncode == 0, stderr
    assert_same_run(run, uninterrupted)
    reader = RunReader(run)
    assert [event["worker"] for event in reader.events("worker_dead")] == ["engine-1"]
    assert [event["worker"] for event in reader.events("restart")] == ["engine-1"]
    assert reader.attempt == 1 and pid_of(run, "engine-1") != first
    assert "lost: engine-1" in stderr and "restarted: engine-1" in stderr


def test_a_killed_trainer_resumes_by_itself_from_the_last_checkpoint(cli: Cli, uninterrupted: Path) -> None:
    process = cli.start_until(Pause(*RECORDING_A_STEP, call=6), "train", *SMALL, "--executor", "ray")
    run = cli.only_run()
    os.kill(pid_of(run, "trainer-0"), signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    _, stderr = cli.outcome(process)
    assert process.returncode == 0, stderr
    assert metrics_of(run) == metrics_of(uninterrupted)
    reader = RunReader(run)
    assert reader.attempt == 2 and reader.history.resumes[2] == 3
    assert [event["worker"] for event in reader.events("restart")] == ["trainer-0"]
    assert summary_of(run)["steps"] == 12 and summary_of(run)["attempt"] == 2


def test_a_trainer_that_may_not_be_replaced_ends_the_run_with_its_name(cli: Cli) -> None:
    once = ("--executor", "ray", "--max-worker-restarts", "0")
    process = cli.start_until(Pause(*RECORDING_A_STEP, call=3), "train", *SMALL, *once)
    run = cli.only_run()
    os.kill(pid_of(run, "trainer-0"), signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    _, stderr = cli.outcome(process)
    assert process.returncode == 1 and "trainer-0 was lost" in stderr and "Traceback" not in stderr
    assert summary_of(run)["status"] == "failed"


def test_sigterm_saves_and_ends_every_process(cli: Cli) -> None:
    long = ("--num-rollout", "200", "--executor", "ray")
    process = cli.start_until(Pause(*RECORDING_A_STEP, call=4), "train", *SMALL, *long)
    run, family = cli.only_run(), family_of(process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    _, stderr = cli.outcome(process)
    assert process.returncode == 143, stderr
    stopped = summary_of(run)
    assert (stopped["status"], stopped["steps"]) == ("interrupted", 4)
    assert (run / "checkpoints" / f"step-{stopped['steps']:06d}").is_dir()
    assert_ended(family)
    # A run may change its executor: the record and the checkpoints are the same.
    changes = ("--set", 'run.executor="inline"', "--set", f"rollout.num_rollout={stopped['steps'] + 1}")
    resumed = cli("runs", "resume", run.name, *changes)
    assert resumed.returncode == 0, resumed.stderr
    assert summary_of(run)["steps"] == stopped["steps"] + 1
