"""Any way to cut the model over two processes trains what one process trains, over five steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from miles.arch import ArchSpec
from miles.training.megatron.layout import MegatronLayout
from miles.training.settings import OptimizerSettings, TrainerSettings

pytestmark = pytest.mark.slow

SETTINGS = TrainerSettings(optimizer=OptimizerSettings(lr=2e-3), max_tokens_per_micro_batch=40)
LAYOUTS = {
    "TP2 with sequence parallelism and ETP2": MegatronLayout(tp=2, etp=2, sequence_parallel=True),
    "TP2 with sequence parallelism and EP2": MegatronLayout(tp=2, ep=2, sequence_parallel=True),
    "PP2, sequences of many lengths": MegatronLayout(pp=2, first_stage_layers=1),
    "EP2": MegatronLayout(ep=2),
    "DP2": MegatronLayout(),
}
ALONE = "one process"


@pytest.fixture(scope="module")
def outcomes(
    world: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, spec: ArchSpec, make_batches: Any
) -> dict[str, Any]:
    """Results of rank 0 and 1 by layout, and of one process."""
    root = tmp_path_factory.mktemp("layouts")
    how = {"spec": spec, "settings": SETTINGS, "batches": make_batches(spec, 5)}
    cases = {name: ("train", how | {"layout": layout}) for name, layout in LAYOUTS.items()}
    both = world(2, root / "two", cases)
    (one,) = world(1, root / "one", {ALONE: ("train", how | {"layout": MegatronLayout()})})
    return {name: (both[0][name], both[1][name]) for name in LAYOUTS} | one


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_equal_one(layout: str, outcomes: dict[str, Any]) -> None:
    (first, weights), (second, _) = outcomes[layout]
    expected, alone = outcomes[ALONE]
    assert first == second
    for step, (row, right) in enumerate(zip(first, expected, strict=True)):
        assert row["train/loss"] == pytest.approx(right["train/loss"], abs=1e-4), step
        assert row["train/grad_norm"] == pytest.approx(right["train/grad_norm"], rel=1e-3), step
        assert row == pytest.approx(right, rel=1e-3, abs=1e-4), step
    for name, tensor in weights.items():
        assert (tensor - alone[name]).abs().mean() <= 1e-5, name
        assert torch.isfinite(tensor).all()
