"""What a run file says of the algorithm reaches the trainer, user functions included."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from miles.algorithms.corrections import CorrectionRows
from miles.algorithms.importance import ImportanceCorrection
from miles.algorithms.losses import LossRows, PolicyLossSettings
from miles.algorithms.rejection import Rejection
from miles.algorithms.sequences import Sequences
from miles.config import parse_flags, resolve
from miles.data.batch import TrainBatch, pack
from miles.data.hooks import HookError
from miles.data.sample import Sample, SampleStatus
from miles.orchestration.algorithm_settings import algorithm_settings
from miles.training.batch_advantages import with_advantages
from miles.training.settings import AlgorithmSettings

PLAN = SimpleNamespace(max_response_len=16)


def settings_of(line: str) -> AlgorithmSettings:
    return algorithm_settings(resolve(flags=parse_flags(line.split())).config, PLAN)  # type: ignore[arg-type]


CORRECTIONS = {
    "": PolicyLossSettings(),
    "--use-tis": PolicyLossSettings(correction=ImportanceCorrection(0.0, 2.0)),
    "--use-tis --tis-mode mask --tis-clip-low 0.5 --tis-clip 5": PolicyLossSettings(
        correction=ImportanceCorrection(0.5, 5.0, "mask")
    ),
    "--use-tis --tis-threshold 0.8 --tis-level geometric --tis-batch-normalize": PolicyLossSettings(
        correction=ImportanceCorrection(0.8, 1.25, "mask", "geometric", batch_normalize=True, threshold=0.8)
    ),
    "--use-rs --rs-level sequence --rs-lower-bound 0.1 --rs-upper-bound 9 --rs-veto-threshold 1e-4": (
        PolicyLossSettings(rejection=Rejection("sequence", 0.1, 9.0, 1e-4))
    ),
    "--get-mismatch-metrics --tis-level sequence": PolicyLossSettings(
        correction=ImportanceCorrection(0.0, 2.0, level="sequence", applied=False),
        rejection=Rejection(applied=False),
        mismatch_metrics=True,
    ),
}


@pytest.mark.parametrize("line", CORRECTIONS)
def test_flags_of_corrections(line: str) -> None:
    assert settings_of(line).policy == CORRECTIONS[line]


MINE = """
import torch

def mis(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **more):
    weights = [torch.exp(t - r).clamp(max=args.correction.tis_clip)
               for t, r in zip(train_log_probs, rollout_log_probs)]
    masks = [mask * (weight.mean() < 2) for mask, weight in zip(loss_masks, weights)]
    return pg_loss * torch.cat(weights), masks, {"mine": torch.cat(weights)}

def short(args, **more):
    return more["pg_loss"][:1], more["loss_masks"], {}

def broken(args, **more):
    raise ZeroDivisionError("oh")

def loss(args, rows):
    loss = -(rows.weights_T * rows.advantages_T * rows.log_probs_T).sum() * args.algorithm.eps_clip
    return loss, {"tokens": rows.loss_mask_T.sum()}

def many_losses(args, rows):
    return rows.log_probs_T

def advantages(args, batch):
    return batch.rewards[batch.sequence_ids]

def of_samples(args, batch):
    return batch.rewards

def by_constant(total_lengths, response_lengths, loss_masks, calculate_per_token_loss):
    assert total_lengths == [3, 4] and not calculate_per_token_loss
    def reduce(losses):
        parts = zip(losses.split(response_lengths), loss_masks)
        return sum((part * mask).sum() / 10 for part, mask in parts)
    return reduce

def squared(total_lengths, response_lengths, loss_masks, calculate_per_token_loss):
    return lambda losses: (losses ** 2).sum()
"""


def with_function(tmp_path: Path, line: str) -> AlgorithmSettings:
    path = tmp_path / "my_tis.py"
    path.write_text(MINE)
    return settings_of(line.replace("MINE", str(path)))


def corrected(tmp_path: Path, name: str):
    policy = with_function(tmp_path, f"--use-tis --tis-clip 3 --custom-tis-function-path MINE:{name}").policy
    assert policy.correction is None and policy.custom_correction is not None
    return policy.custom_correction(
        CorrectionRows(
            pg_loss_T=torch.ones(3),
            old_log_probs_T=torch.tensor([0.0, 0.0, 5.0]),
            rollout_log_probs_T=torch.zeros(3),
            loss_mask_T=torch.ones(3),
            sequences=Sequences(torch.tensor([0, 2, 3])),
        )
    )


def test_a_correction_of_the_users_own_is_called_as_upstream_calls_it(tmp_path: Path) -> None:
    result = corrected(tmp_path, "mis")
    assert result.pg_loss_T.tolist() == [1, 1, 3]
    assert result.kept_T.tolist() == [1, 1, 0]
    assert result.means_T["custom/mine"].tolist() == [1, 1, 3]


@pytest.mark.parametrize(("name", "words"), [("short", r"returned a tensor \[1\]"), ("broken", "failed")])
def test_a_function_that_fails_or_returns_something_else_is_blamed(
    name: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(HookError, match=words) as refusal:
        corrected(tmp_path, name)
    assert "my_tis.py" in refusal.value.where


def batch() -> TrainBatch:
    def sample(prompt: int, response: int, reward: float) -> Sample:
        return Sample(
            "?",
            tokens=list(range(prompt + response)),
            response_length=response,
            reward=reward,
            status=SampleStatus.COMPLETED,
            rollout_log_probs=np.full(response, -1.0, np.float32),
            loss_mask=[1] * (response - 1) + [0],
        )

    return pack([sample(1, 2, 0.5), sample(1, 3, 2.0)])


def test_a_loss_of_the_users_own(tmp_path: Path) -> None:
    words = "--loss-type custom_loss --eps-clip 0.5 --custom-loss-function-path MINE:"
    rows = LossRows(
        log_probs_T=torch.tensor([-1.0, -3.0], requires_grad=True),
        loss_mask_T=torch.ones(2),
        weights_T=torch.full((2,), 0.5),
        sequences=Sequences(torch.tensor([0, 2])),
        sequence_weight=1.0,
        advantages_T=torch.tensor([1.0, 2.0]),
    )
    own = with_function(tmp_path, words + "loss").custom_loss
    assert own is not None
    output = own(rows)
    assert output.loss.item() == pytest.approx(1.75) and output.loss.requires_grad
    assert output.metrics == {"loss": output.loss.detach(), "custom/tokens": 2}
    wrong = with_function(tmp_path, words + "many_losses").custom_loss
    with pytest.raises(HookError, match=r"returned a tensor \[2\]"):
        wrong(rows)  # type: ignore[misc]


def test_advantages_of_the_users_own_reach_trained_rows_only(tmp_path: Path) -> None:
    settings = with_function(tmp_path, "--custom-advantage-function-path MINE:advantages")
    advised, _ = with_advantages(batch(), settings)
    assert advised.advantages is not None and advised.advantages.tolist() == [0.5, 0, 2, 2, 0]
    settings = with_function(tmp_path, "--custom-advantage-function-path MINE:of_samples")
    with pytest.raises(HookError, match=r"\[2\]"):
        with_advantages(batch(), settings)


def test_a_reduction_of_the_users_own_becomes_weights(tmp_path: Path) -> None:
    line = "--custom-pg-loss-reducer-function-path MINE:"
    by_constant = with_function(tmp_path, line + "by_constant").custom_reducer
    assert by_constant is not None
    # A sum over samples of sum / 10, divided by two rollouts; masked rows have no weight.
    assert by_constant(batch(), 2).tolist() == pytest.approx([0.05, 0, 0.05, 0.05, 0])
    squared = with_function(tmp_path, line + "squared").custom_reducer
    assert squared is not None
    with pytest.raises(HookError, match="not linear"):
        squared(batch(), 2)
