"""SGLang servers and a Megatron trainer as Ray workers, and what the loss of the trainer means there."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
import pytest
from e2e_support import RECORDING_A_STEP, Cli, summary_of
from preloaded import Pause
from sglang_support import ATTACHED, TRAIN

from miles.record import RunReader
from miles.rollout.sglang.server import ServerProcess

pytestmark = [pytest.mark.scale, pytest.mark.usefixtures("no_server_is_left")]

FEW = ("--rollout-batch-size", "8", "--skip-eval-before-train", "--executor", "ray")


def assert_whole(run: Path, steps: int) -> None:
    """Every step has all of its samples once, drawn by the weights of the step before, with their routes."""
    reader = RunReader(run)
    for step in range(1, steps + 1):
        samples = reader.samples(step)
        assert len({sample["index"] for sample in samples}) == len(samples) == 8 * 8
        assert {version for s in samples for version, _ in s["weight_versions"]} == {step - 1}
    rows = [row.metrics for row in reader.rows() if row.step]
    assert len(rows) == steps
    assert all(row["route/replayed_rows_frac"] == 1.0 for row in rows)
    assert all(row["train/train_rollout_logprob_abs_diff"] < 1e-5 for row in rows)


def test_weights_are_broadcast_to_a_ray_worker_s_server_and_to_the_one_in_its_place(cli: Cli) -> None:
    """A process group of the two worker processes; the server is killed once, between two steps."""
    size = ("--num-rollout", "4", "--sample-records-per-step", "64", "--update-weight-buffer-size", "200000")
    mode = ("--update-weight-transfer-mode", "broadcast", "--check-weight-update-equal")
    words = (*TRAIN, *FEW, *size, *mode, "--train-backend", "megatron")
    process = cli.start_until(Pause(*RECORDING_A_STEP, call=2), *words)
    run = cli.only_run()
    worker = next(e["pid"] for e in RunReader(run).events("worker_start") if e["worker"] == "engine-0")
    psutil.Process(worker).children()[0].kill()
    process.send_signal(signal.SIGCONT)
    _, stderr = cli.outcome(process)
    assert process.returncode == 0, stderr
    assert_whole(run, 4)
    assert (run / "logs" / "server-0.log").stat().st_size > 0
    reader = RunReader(run)
    assert [event["worker"] for event in reader.events("worker_dead")] == ["engine-0"]
    compared = {
        event["version"]: event["checksums"]["engine-0"] for event in reader.events("weights_compared")
    }
    assert list(compared) == [0, 1, 2, 3, 4] and len(set(compared.values())) == 5
    sent = reader.events("weights_broadcast")
    assert {event["version"] for event in sent} == {0, 1, 2, 3, 4}
    assert len({event["bytes"] for event in sent}) == 1 and {event["buckets"] for event in sent} == {5}
    assert len(reader.events("engine_gauges")) == 5


def test_a_killed_megatron_trainer_resumes_by_itself_from_the_last_checkpoint(
    cli: Cli, sglang_server: ServerProcess
) -> None:
    """Its successor loads the checkpoint and hands those weights to the server, which went on alone."""
    size = ("--num-rollout", "6", "--save-interval", "2", "--sample-records-per-step", "64")
    words = (*TRAIN, *FEW, *size, "--train-backend", "megatron", *ATTACHED, sglang_server.url)
    process = cli.start_until(Pause(*RECORDING_A_STEP, call=4), *words)
    run = cli.only_run()
    pid = json.loads((run / "heartbeat" / "trainer-0.json").read_text())["pid"]
    os.kill(pid, signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    _, stderr = cli.outcome(process)
    assert process.returncode == 0, stderr
    assert "restarted: trainer-0" in stderr
    reader = RunReader(run)
    assert [event["worker"] for event in reader.events("worker_dead")] == ["trainer-0"]
    assert reader.attempt == 2 and reader.history.resumes[2] == 2
    assert summary_of(run)["status"] == "finished" and summary_of(run)["steps"] == 6
    assert_whole(run, 6)
    assert sglang_server.ended is None


def test_a_server_goes_on_while_weights_change_under_it(cli: Cli, sglang_server: ServerProcess) -> None:
    """Fully asynchronous: requests in flight get new weights, and no token is older than the bound."""
    flow = ("--fully-async", "--max-weight-staleness", "2", "--use-tis", "--sample-records-per-step", "64")
    done = cli(*TRAIN, *FEW, *flow, "--num-rollout", "6", *ATTACHED, sglang_server.url)
    assert done.returncode == 0, done.stderr
    reader = RunReader(cli.only_run())
    rows = {row.step: row.metrics for row in reader.rows() if row.step}
    seen: set[int] = set()
    for step in range(1, 7):
        samples = reader.samples(step)
        groups = {sample["group_index"] for sample in samples}
        assert len(groups) == 8 and len(samples) == 64 and not groups & seen
        seen |= groups
        versions = {version for sample in samples for version, _ in sample["weight_versions"]}
        assert min(versions) >= step - 3 and max(versions) <= step - 1
        assert rows[step]["rollout/fully_async/max_staleness"] == step - 1 - min(versions)
        assert rows[step]["route/replayed_rows_frac"] == 1.0
    assert max(row["rollout/fully_async/stale_ratio"] for row in rows.values()) > 0
    assert sglang_server.ended is None
