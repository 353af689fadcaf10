"""Real megatron-core trains the quickstart's MoE, chosen by one setting."""

from __future__ import annotations

import pytest
from e2e_support import Cli, summary_of

from miles.record import RunReader

pytest.importorskip("megatron.core")
pytestmark = pytest.mark.slow


def test_the_quickstart_learns_on_megatron(cli: Cli) -> None:
    done = cli(
        *("train", "--profile", "quickstart", "--set", "training.backend=megatron", "--num-rollout", "20"),
        *("--eval-prompt-data", "sort", "builtin:sort/test@[0:64]"),
    )
    assert done.returncode == 0, done.stderr
    run = cli.only_run()
    summary = summary_of(run)
    assert summary["status"] == "finished" and summary["steps"] == 20
    assert summary["reward_last5"] >= summary["reward_first5"] + 0.15
    rows = RunReader(run).rows()
    assert all(row.metrics["route/replayed_rows_frac"] == 1 for row in rows if row.step)
    assert all(row.metrics["train/train_rollout_logprob_abs_diff"] < 1e-5 for row in rows if row.step)
