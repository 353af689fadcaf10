"""Engines that never pause: real processes, a bounded age of samples, a killed run, and what it learns."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from e2e_support import RECORDING_A_STEP, Cli
from preloaded import Pause

from miles.data.held_groups import read_groups
from miles.orchestration.driver import HELD_GROUPS
from miles.record import RunReader

pytestmark = pytest.mark.slow

STEPS = 30
FLOW = (
    *("train", "--profile", "quickstart", "--num-rollout", str(STEPS), "--save-interval", "6"),
    *("--fully-async", "--max-weight-staleness", "1", "--use-tis", "--skip-eval-before-train"),
    # The compiled kernel draws such short responses to their end before new weights come.
    *("--decode-kernel", "torch", "--sample-records-per-step", "256"),
)


def test_the_reward_rises_under_a_bound_on_staleness_also_over_a_kill(cli: Cli) -> None:
    process = cli.start_until(Pause(*RECORDING_A_STEP, call=9), *FLOW)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = cli("runs", "resume", "last")
    assert resumed.returncode == 0, resumed.stderr
    run = cli.only_run()
    reader = RunReader(run)
    rows = {row.step: row.metrics for row in reader.rows() if row.step}
    assert sorted(rows) == list(range(1, STEPS + 1))
    rewards = [rows[step]["rollout/raw_reward"] for step in sorted(rows)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
    for step, row in rows.items():
        assert row["rollout/fully_async/max_staleness"] <= 1
        assert step - 1 - row["rollout/weight_version/min"] <= 1
    assert max(row["rollout/fully_async/stale_ratio"] for row in rows.values()) > 0
    assert max(row["rollout/weight_version/mixed_version_ratio"] for row in rows.values()) > 0
    assert_every_prompt_once(run, reader)


def test_engines_that_are_killed_under_it_cost_no_sample_and_double_none(cli: Cli) -> None:
    """Both at once, while the loop stands still and they draw; and one of their successors."""
    pause = Pause(*RECORDING_A_STEP, call=4)
    process = cli.start_until(pause, *FLOW, "--executor", "ray", "--num-engines", "2")
    run = cli.only_run()
    for engine in ("engine-0", "engine-1"):
        os.kill(pid_of(run, engine), signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    cli.wait_until(lambda: len(RunReader(run).events("restart")) == 2, process)
    os.kill(pid_of(run, "engine-1"), signal.SIGKILL)
    _, stderr = cli.outcome(process)
    assert process.returncode == 0, stderr
    reader = RunReader(run)
    lost = sorted(event["worker"] for event in reader.events("worker_dead"))
    assert lost == ["engine-0", "engine-1", "engine-1"] and reader.attempt == 1
    rows = {row.step: row.metrics for row in reader.rows() if row.step}
    assert sorted(rows) == list(range(1, STEPS + 1))
    assert max(row["rollout/fully_async/max_staleness"] for row in rows.values()) <= 1
    assert_every_prompt_once(run, reader)


def pid_of(run: Path, worker: str) -> int:
    return int(json.loads((run / "heartbeat" / f"{worker}.json").read_text())["pid"])


def assert_every_prompt_once(run: Path, reader: RunReader) -> None:
    """No prompt was lost, and none was trained on twice."""
    trained = [{s["group_index"] for s in reader.samples(step)} for step in range(1, STEPS + 1)]
    assert all(len(groups) == 32 for groups in trained)
    seen = set.union(*trained)
    assert len(seen) == 32 * STEPS
    held = read_groups(run / "checkpoints" / f"step-{STEPS:06d}" / HELD_GROUPS)
    drawn = seen | {group[0].group_index for group in held}
    assert drawn == set(range(len(drawn)))
