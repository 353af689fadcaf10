"""Two trainer ranks as Ray actors: the run of one process, with a rank killed, and on with another number."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from e2e_support import RECORDING_A_STEP, SMALL, Cli, metrics_of
from preloaded import Pause

from miles.record import RunReader

pytestmark = pytest.mark.slow

SHORT = (*SMALL, "--num-rollout", "5", "--save-interval", "2")
"""Rounding differs between the layouts; in five steps it does not yet change a sampled token."""


@pytest.fixture(scope="module")
def inline(shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    cli = Cli(shared_cache, tmp_path_factory.mktemp("one-process"))
    done = cli("train", *SHORT)
    assert done.returncode == 0, done.stderr
    return cli.only_run()


def assert_same(run: Path, other: Path) -> None:
    found, expected = metrics_of(run), metrics_of(other)
    assert found.keys() == expected.keys()
    for step, metrics in expected.items():
        assert found[step] == pytest.approx(metrics, abs=1e-5, rel=1e-5), step


def test_two_ranks_give_the_metrics_of_one_process(cli: Cli, inline: Path) -> None:
    done = cli("train", *SHORT, "--executor", "ray", "--data-parallel-size", "2")
    assert done.returncode == 0, done.stderr
    assert_same(cli.only_run(), inline)
    writers = {path.stem for path in (cli.only_run() / "events").iterdir()}
    assert {"trainer-0", "trainer-1"} <= writers


def test_two_ranks_go_on_from_the_checkpoint_of_one_process(cli: Cli, inline: Path) -> None:
    shutil.copytree(inline, cli.runs / inline.name)
    resumed = cli("runs", "resume", "last", "--from-step", "2", "--set", "training.data_parallel_size=2")
    assert resumed.returncode == 0, resumed.stderr
    assert_same(cli.only_run(), inline)


def test_a_killed_rank_brings_both_back_from_the_last_checkpoint(cli: Cli, inline: Path) -> None:
    process = cli.start_until(Pause(*RECORDING_A_STEP, call=4), "train", *SHORT, "--data-parallel-size", "2")
    os.kill(pid_of(cli.only_run(), "trainer-1"), signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    _, stderr = cli.outcome(process)
    assert process.returncode == 0, stderr
    assert_same(cli.only_run(), inline)
    assert RunReader(cli.only_run()).attempt == 2


def pid_of(run: Path, worker: str) -> int:
    for line in (run / "events" / f"{worker}.jsonl").read_text().splitlines():
        event = json.loads(line)
        if "worker_start" in line:
            return int(event["pid"])
    raise AssertionError(f"{worker} never started")
