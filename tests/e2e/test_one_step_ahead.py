"""Rollouts one step ahead on this machine: real processes, samples one version old, and an exact resume."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from e2e_support import RECORDING_A_STEP, SMALL, Cli, metrics_of
from preloaded import Pause

from miles.record import RunReader

pytestmark = pytest.mark.slow

AHEAD = (*SMALL, "--num-rollout", "7", "--save-interval", "2", "--one-step-ahead", "--use-tis")


def test_a_killed_run_resumes_exactly_and_samples_are_one_version_old(cli: Cli, tmp_path: Path) -> None:
    whole = Cli(cli.cache, tmp_path / "whole")
    finished = whole("train", *AHEAD)
    assert finished.returncode == 0, finished.stderr
    rows = metrics_of(whole.only_run())
    newest = {step: row["rollout/weight_version/max"] for step, row in rows.items() if step > 0}
    assert newest == {step: max(step - 2, 0) for step in range(1, 8)}
    assert all(rows[step]["rollout/weight_version/mixed_version_ratio"] == 0 for step in newest)
    assert rows[1]["train/tis"] == pytest.approx(1, abs=1e-4) and rows[3]["train/tis_abs"] > 0

    process = cli.start_until(Pause(*RECORDING_A_STEP, call=6), "train", *AHEAD)
    assert RunReader(cli.only_run()).history.last_step == 5
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = cli("runs", "resume", "last")
    assert resumed.returncode == 0, resumed.stderr
    assert metrics_of(cli.only_run()) == rows
