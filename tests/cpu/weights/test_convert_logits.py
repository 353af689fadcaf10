"""`--check-logits`: both models predict random tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from convert_support import make_checkpoint

from miles.arch.precision import NumberFormat
from miles.errors import MilesError
from miles.weights.convert import Wanted, check_of_logits, convert, open_source, plan_conversion
from miles.weights.convert.logits import compared


def checked(base: Path, target: Path, wanted: Wanted) -> dict[str, float]:
    plan = plan_conversion(open_source(base), target, wanted)
    logits: dict[str, float] = convert(plan, check=check_of_logits(plan))["checks"]["logits"]
    return logits


def test_a_lossless_copy_predicts_the_same_and_a_rounded_one_nearly(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    same = checked(base, tmp_path / "fp32", Wanted(NumberFormat("fp32"), mtp_num_layers=1))
    assert (same["kl"], same["max_difference"], same["same_best"]) == (0, 0, 1)
    near = checked(base, tmp_path / "int8", Wanted(NumberFormat("int8")))
    far = checked(base, tmp_path / "fp8", Wanted(NumberFormat("fp8")))
    assert 0 < near["kl"] < far["kl"] < 0.1
    assert near["tokens"] == 256


def test_numbers_of_the_comparison() -> None:
    before, after = (
        torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(),
        torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log(),
    )
    found = compared(before, after)
    assert found["kl"] == pytest.approx(0.5 * (0.5 * torch.tensor(4 / 3).log().item()), rel=1e-5)
    assert found["same_best"] == 0.5
    with pytest.raises(MilesError, match="predicts NaN"):
        compared(before, after * float("nan"))
