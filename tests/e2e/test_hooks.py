"""Runs with corrections, shaped rewards and functions of the user's own, and a reference that follows."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e_support import SMALL, Cli, metrics_of

from miles.record import RunReader

pytestmark = pytest.mark.slow

MINE = """
import torch

def mis(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **more):
    weights = [torch.exp(t - r).clamp(max=2) for t, r in zip(train_log_probs, rollout_log_probs)]
    return pg_loss * torch.cat(weights), loss_masks, {"weight": torch.cat(weights)}

def loss(args, rows):
    return -(rows.weights_T * rows.advantages_T * rows.log_probs_T).sum()

def advantages(args, batch):
    return (batch.rewards - batch.rewards.mean())[batch.sequence_ids]

def reducer(total_lengths, response_lengths, loss_masks, calculate_per_token_loss):
    mask = torch.cat(loss_masks)
    return lambda losses: (losses * mask).sum() / 16

def post_process(args, samples):
    raw = [sample.reward for sample in samples]
    return raw, [reward - 0.25 for reward in raw]

def without_truncated(args, groups):
    for group in groups:
        for sample in group:
            sample.remove_sample = sample.status.value == "truncated"

def newest(args, rollout_id, buffer, num_samples):
    return buffer[-num_samples:]
"""

CORRECTIONS = (
    *("--use-tis", "--tis-level", "geometric", "--tis-mode", "mask"),
    *("--tis-clip-low", "0.9", "--tis-clip", "1.1"),
    *("--tis-batch-normalize", "--use-rs", "--rs-level", "sequence", "--rs-veto-threshold", "1e-3"),
    "--get-mismatch-metrics",
)
PARTIAL = ("--partial-rollout", "--over-sampling-batch-size", "12", "--decode-kernel", "torch")
REFERENCE = ("--use-kl-loss", "--kl-loss-coef", "0.01", "--kl-loss-type", "k3", "--ref-update-interval", "2")


def test_every_correction_and_the_overlong_penalty_in_a_run_that_resumes(cli: Cli) -> None:
    more = ("--num-rollout", "4", "--save-interval", "2", "--overlong-buffer-len", "4", *REFERENCE)
    done = cli("train", *SMALL, *CORRECTIONS, *PARTIAL, *more)
    assert done.returncode == 0, done.stderr
    run = cli.only_run()
    before = metrics_of(run)
    for name in ("tis", "tis_scale", "rs_frac", "rs_veto_frac", "mis_ppl_ratio", "mis_k3_kl"):
        assert f"train/{name}" in before[4], name
    assert min(before[step]["rollout/overlong_penalty"] for step in before if step) < 0
    shown = RunReader(run).samples(1)
    assert all(sample["shaped_reward"] <= sample["reward"] for sample in shown)
    # The reference becomes the policy of step 2: at step 3 they are one step apart, and at step 2 two.
    assert 0 <= before[3]["train/kl_loss"] < before[2]["train/kl_loss"]
    assert (run / "checkpoints" / "step-000002" / "trainer" / "reference").is_dir()
    resumed = cli("runs", "resume", str(run), "--from-step", "2")
    assert resumed.returncode == 0, resumed.stderr
    assert metrics_of(run) == before


OWN = {
    "correction": ("--use-tis", "--custom-tis-function-path", "MINE:mis"),
    "loss": (
        *("--loss-type", "custom_loss", "--custom-loss-function-path", "MINE:loss"),
        *("--custom-advantage-function-path", "MINE:advantages"),
    ),
    "the rest": (
        *("--custom-pg-loss-reducer-function-path", "MINE:reducer", *PARTIAL),
        *("--custom-reward-post-process-path", "MINE:post_process"),
        *("--rollout-sample-filter-path", "MINE:without_truncated", "--buffer-filter-path", "MINE:newest"),
    ),
}


@pytest.mark.parametrize("words", OWN.values(), ids=OWN.keys())
def test_functions_of_the_users_own_in_a_run(words: tuple[str, ...], cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    given = [word.replace("MINE", str(tmp_path / "mine.py")) for word in words]
    done = cli("train", *SMALL, *given, "--num-rollout", "2")
    assert done.returncode == 0, done.stderr
    last = metrics_of(cli.only_run())[2]
    assert last["train/grad_norm"] > 0
    assert ("train/custom/weight" in last) == ("--use-tis" in words)
    if "--custom-reward-post-process-path" in words:
        assert last["rollout/rewards"] == pytest.approx(last["rollout/raw_reward"] - 0.25)
