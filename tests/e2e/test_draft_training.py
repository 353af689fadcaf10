"""Speculative rollout with a draft that learns along: the shipped profile, in one process and on Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e_support import Cli, metrics_of

from miles.arch import load_spec
from miles.record import RunReader

pytestmark = pytest.mark.slow

FEW = (
    *("--profile", "quickstart-mtp", "--num-rollout", "3", "--rollout-batch-size", "8"),
    *("--n-samples-per-prompt", "4", "--save-interval", "3", "--skip-eval-before-train"),
    *("--eval-prompt-data", "sort", "builtin:sort/test@[0:8]"),
)
ENGINE_ROUNDING = ("train/train_rollout", "rollout/rollout_log_probs", "perf/")


def comparable(run: Path) -> dict[int, dict[str, float]]:
    """Metrics without speeds and the rounding of the engine's own log-probs."""
    return {
        step: {name: value for name, value in row.items() if not name.startswith(ENGINE_ROUNDING)}
        for step, row in metrics_of(run).items()
    }


def test_a_draft_learns_and_travels_with_the_policy(cli: Cli) -> None:
    """The same run on Ray, where policy and draft cross in one packet, gives the same numbers."""
    inline = cli("train", *FEW)
    assert inline.returncode == 0, inline.stderr
    run = cli.only_run()
    for row in metrics_of(run).values():
        assert row["rollout/spec_accept_length"] > 2.0
        assert row["train/mtp_loss"] < 1.0
        assert {f"train/mtp_accuracy/depth_{depth}" for depth in (1, 2, 3)} <= row.keys()
    (saved,) = (
        path.parent for path in RunReader(run).layout.checkpoints_dir.glob("step-*/trainer/model/config.json")
    )
    assert load_spec(saved).mtp_num_layers == 1
    apart = cli("train", *FEW, "--executor", "ray", "--runs-dir", str(cli.runs.parent / "ray"))
    assert apart.returncode == 0, apart.stderr
    (other,) = (cli.runs.parent / "ray").iterdir()
    ours, theirs = comparable(run), comparable(other)
    assert theirs.keys() == ours.keys()
    for step, row in ours.items():
        assert theirs[step] == pytest.approx(row, abs=1e-6), step
