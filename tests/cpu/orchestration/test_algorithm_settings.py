"""What a run file says of the algorithm reaches the trainer, user functions included."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from miles.algorithms.corrections import CorrectionRows
from miles.algorithms.importance import ImportanceCorrection
from miles.algorithms.losses import PolicyLossSettings
from miles.algorithms.rejection import Rejection
from miles.algorithms.sequences import Sequences
from miles.config import parse_flags, resolve
from miles.data.hooks import HookError
from miles.orchestration.algorithm_settings import algorithm_settings
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
"""


def corrected(tmp_path: Path, name: str):
    path = tmp_path / "my_tis.py"
    path.write_text(MINE)
    policy = settings_of(f"--use-tis --tis-clip 3 --custom-tis-function-path {path}:{name}").policy
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
