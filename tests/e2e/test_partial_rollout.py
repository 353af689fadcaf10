"""Partial rollouts, tool turns and an engine in bf16 in whole runs, in one process and in several."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e_support import SMALL, Cli, metrics_of

from miles.record import RunReader

pytestmark = pytest.mark.slow

PARTIAL = ("--partial-rollout", "--over-sampling-batch-size", "12", "--mask-offpolicy-in-partial-rollout")
GAP = "train/train_rollout_logprob_abs_diff"

TOOLS = """
from miles.rollout.tool_turns import tool_turns

def hint(text):
    return "?" if len(text) % 2 else None

generate = tool_turns(hint, max_outputs=2)
"""


def samples_of(run: Path, step: int) -> list[dict]:
    return RunReader(run).samples(step)


def test_a_resumed_run_goes_on_with_the_samples_that_were_unfinished(cli: Cli) -> None:
    # The compiled kernel draws such short responses to their end in one call.
    words = (*PARTIAL, "--decode-kernel", "torch", "--num-rollout", "6", "--save-interval", "3")
    done = cli("train", *SMALL, *words)
    assert done.returncode == 0, done.stderr
    whole = cli.only_run()
    assert (whole / "checkpoints" / "step-000003" / "held_groups.jsonl").stat().st_size > 0
    kept = RunReader(whole).series("rollout/kept_groups").values
    assert len(kept) == 6 and max(kept) > 0
    assert max(RunReader(whole).series("rollout/weight_version/mixed_version_ratio").values) > 0
    assert max(RunReader(whole).series(GAP).values) < 1e-4, "older weights are no gap"
    before = metrics_of(whole)
    resumed = cli("runs", "resume", str(whole), "--from-step", "3")
    assert resumed.returncode == 0, resumed.stderr
    assert metrics_of(whole) == before


def test_tools_speak_in_a_run(cli: Cli, tmp_path: Path) -> None:
    tools = tmp_path / "my_tools.py"
    tools.write_text(TOOLS)
    words = ("--custom-generate-function-path", f"{tools}:generate", "--rollout-max-response-len", "24")
    done = cli("train", *SMALL, *words, "--num-rollout", "2")
    assert done.returncode == 0, done.stderr
    run = cli.only_run()
    told = [sample for sample in samples_of(run, 1) if sample["loss_mask"] and 0 in sample["loss_mask"]]
    assert told, "the tool was heard in some sample"
    for sample in told:
        silent = [log_prob is None for log_prob in sample["rollout_log_probs"]]
        assert silent == [mask == 0 for mask in sample["loss_mask"]]
        assert "?" in sample["response"]
    metrics = RunReader(run)
    assert list(metrics.series("route/replayed_rows_frac").values) == [1.0, 1.0]
    assert max(metrics.series(GAP).values) < 1e-4


def test_processes_of_their_own_train_on_the_same_bf16_samples(cli: Cli) -> None:
    """Weights cross to the engine in bf16 and routes come back in one byte per id: nothing is lost."""
    words = (*SMALL, *PARTIAL[:3], "--rollout-format", "bf16", "--num-rollout", "3")
    runs = {}
    for executor in ("inline", "ray"):
        done = cli("train", *words, "--executor", executor, "--run-name", executor)
        assert done.returncode == 0, done.stderr
        (runs[executor],) = cli.runs.glob(f"{executor}*")
    inline, ray = (metrics_of(run) for run in runs.values())
    for step in (1, 2, 3):
        assert inline[step]["route/bytes_per_token"] == 8.0
        assert inline[step]["route/wire_bytes_per_token"] == ray[step]["route/wire_bytes_per_token"] == 4.0
        assert ray[step]["route/replayed_rows_frac"] == 1.0
        assert 1e-4 < ray[step][GAP] < 0.05, "the engine computes in bf16"
    assert inline[1]["rollout/raw_reward"] == pytest.approx(ray[1]["rollout/raw_reward"], abs=0.2)
