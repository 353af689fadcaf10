"""What the quickstart promises, on three fixed seeds of data, warm start and training."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e_support import Cli, copy_kernels, summary_of

from miles.data.tasks import assets
from miles.record import RunReader

pytestmark = pytest.mark.slow

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module", params=SEEDS)
def quickstart(
    request: pytest.FixtureRequest, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The whole profile with nothing prepared, as `make demo` runs it; later seeds find kernels compiled."""
    seed = request.param
    root = tmp_path_factory.mktemp(f"quickstart-{seed}")
    if seed != SEEDS[0]:
        copy_kernels(shared_cache, root / "cache")
    cli = Cli(root / "cache", root / "runs")
    task = f"builtin:sort@{seed}"
    done = cli(
        *("train", "--profile", "quickstart", "--hf-checkpoint", task, "--prompt-data", f"{task}/train"),
        *(
            "--eval-prompt-data",
            "sort",
            f"{task}/test",
            "--seed",
            str(seed),
            "--rollout-seed",
            str(42 + seed),
        ),
    )
    assert done.returncode == 0, done.stderr
    assert "sampled" in done.stdout and "greedy" in done.stdout
    return cli.only_run()


def test_the_reward_rises_and_holds_on_prompts_never_trained_on(quickstart: Path) -> None:
    summary = summary_of(quickstart)
    assert summary["status"] == "finished" and summary["steps"] == 80
    assert summary["eval_before"]["sort"]["sampled"] <= 0.42
    assert summary["eval_after"]["sort"]["sampled"] >= 0.85
    assert summary["reward_last5"] >= 0.85 > summary["reward_first5"]
    assert summary["eval_after"]["sort"]["greedy"] >= summary["eval_before"]["sort"]["greedy"]


def test_a_healthy_run_raises_no_alert(quickstart: Path) -> None:
    assert summary_of(quickstart)["alerts"] == {"critical": 0, "warning": 0, "info": 0}
    assert RunReader(quickstart).alerts() == []


def test_replay_and_the_gap_are_reported_at_every_step(quickstart: Path) -> None:
    reader = RunReader(quickstart)
    for name in (
        "route/flip_frac",
        "route/replayed_rows_frac",
        "train/train_rollout_logprob_abs_diff",
        "train/train_rollout_logprob_abs_diff_no_replay",
        "train/train_rollout_kl",
    ):
        assert list(reader.series(name).steps) == list(range(1, 81)), name
    assert set(reader.series("route/replayed_rows_frac").values) == {1.0}


def test_held_out_prompts_are_disjoint_from_training(tmp_path: Path) -> None:
    made = assets("sort", 0, tmp_path)
    held_out = set(made.test.read_text().splitlines())
    assert len(held_out) == 512
    assert not held_out & set(made.train.read_text().splitlines())
