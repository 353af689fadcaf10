"""Any way to cut the model over two processes trains what one process trains, over five steps: the policy,
and an MTP layer along with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miles.arch import ArchSpec
from miles.arch.precision import NumberFormat, precision_policy
from miles.data.batch import TrainBatch
from miles.planning.layout import Layout, layout_problems
from miles.training.megatron.layout import MegatronLayout
from miles.training.megatron.options import MegatronOptions
from miles.training.settings import OptimizerSettings, TrainerSettings

pytestmark = pytest.mark.slow

SETTINGS = TrainerSettings(
    optimizer=OptimizerSettings(lr=2e-3), max_tokens_per_micro_batch=40, train_mtp=True
)
LAYOUTS = {
    "TP2 with sequence parallelism and ETP2": MegatronLayout(tp=2, etp=2, sequence_parallel=True),
    "TP2 with sequence parallelism and EP2": MegatronLayout(tp=2, ep=2, sequence_parallel=True),
    "PP2, sequences of many lengths": MegatronLayout(pp=2, first_stage_layers=1),
    "EP2": MegatronLayout(ep=2),
    "DP2": MegatronLayout(),
    "DP2, distributed optimizer, reduced in backward": MegatronLayout(
        options=MegatronOptions(distributed_optimizer=True, overlap_grad_reduce=True)
    ),
    "EP2, distributed optimizer, gathered in forward": MegatronLayout(
        ep=2,
        options=MegatronOptions(
            distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
        ),
    ),
}
ALONE, ALL_CUT = "one process", "TP2 with sequence parallelism and ETP2"
DEALT_OUT = "EP2, distributed optimizer, gathered in forward"
ROUNDED = {
    f"INT4 QAT, {name}": LAYOUTS[name] for name in (ALL_CUT, "PP2, sequences of many lengths", DEALT_OUT)
}
ROUNDED_ALONE = f"INT4 QAT, {ALONE}"


@pytest.fixture(scope="module")
def outcomes(
    world: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, mtp_spec: ArchSpec, make_batches: Any
) -> dict[str, Any]:
    """Results of rank 0 and 1 by layout, and of one process."""
    root = tmp_path_factory.mktemp("layouts")
    how = {"spec": mtp_spec, "settings": SETTINGS, "batches": make_batches(mtp_spec, 5)}
    int4 = NumberFormat("int4", group_size=4)
    policy = precision_policy(mtp_spec, "fp32", int4, int4)
    rounds = how | {"settings": replace(SETTINGS, precision=policy)}
    cases = {name: ("train", how | {"layout": layout}) for name, layout in LAYOUTS.items()}
    cases |= {name: ("train", rounds | {"layout": layout}) for name, layout in ROUNDED.items()}
    both = world(2, root / "two", cases)
    alone = {ALONE: how, ROUNDED_ALONE: rounds}
    (one,) = world(
        1, root / "one", {n: ("train", h | {"layout": MegatronLayout()}) for n, h in alone.items()}
    )
    return {name: (both[0][name], both[1][name]) for name in cases} | one


@pytest.mark.parametrize("layout", [*LAYOUTS, *ROUNDED])
def test_two_processes_equal_one(layout: str, outcomes: dict[str, Any]) -> None:
    (first, weights), (second, _) = outcomes[layout]
    expected, alone = outcomes[ROUNDED_ALONE if layout in ROUNDED else ALONE]
    assert first == second
    assert ("precision/weight_error" in first[0]) == (layout in ROUNDED)
    for step, (row, right) in enumerate(zip(first, expected, strict=True)):
        assert row["train/loss"] == pytest.approx(right["train/loss"], abs=1e-4), step
        assert row["train/grad_norm"] == pytest.approx(right["train/grad_norm"], rel=1e-3), step
        assert row == pytest.approx(right, rel=1e-3, abs=1e-4), step
    for name, tensor in weights.items():
        assert (tensor - alone[name]).abs().mean() <= 1e-5, name
        assert torch.isfinite(tensor).all()


@pytest.fixture(scope="module", params=[False, True], ids=["published names", "torch_dist"])
def resumed(
    world: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
    mtp_spec: ArchSpec,
    make_batches: Any,
    request: pytest.FixtureRequest,
) -> dict[str, Any]:
    """A run that saved after two steps, its next one, and that of other layouts from there; under TP2, and
    with a distributed optimizer under EP2.
    """
    root = tmp_path_factory.mktemp("resumed")
    batches, how = make_batches(mtp_spec, 3), {"spec": mtp_spec, "settings": SETTINGS}
    saved = root / "saved"
    saved.mkdir()
    first = LAYOUTS[DEALT_OUT if request.param else ALL_CUT]
    cases: dict[str, Any] = {
        "whole": (
            "train",
            how
            | {"layout": first, "batches": batches[:2], "then": batches[2:], "save": saved}
            | {"dist_checkpoints": request.param},
        )
    }
    for name, layout in LAYOUTS.items():
        cases[name] = ("go_on", how | {"layout": layout, "batches": batches[2:], "load": saved})
    results: dict[str, Any] = world(2, root / "two", cases)[0]
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_one_layout_goes_on_in_any_other(layout: str, resumed: dict[str, Any]) -> None:
    """Weights and moments are the same bits; what is computed from them, the same up to rounding."""
    rows, weights, moments = resumed[layout]
    _, expected, kept = resumed[ALL_CUT]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in moments.items())
    assert any(tensor.abs().max() > 0 for tensor in moments.values())
    for row, right in zip(rows, resumed["whole"][0][2:], strict=True):
        assert row["train/loss"] == pytest.approx(right["train/loss"], abs=1e-4)
        assert row["train/grad_norm"] == pytest.approx(right["train/grad_norm"], rel=1e-3)


def test_experts_drift_apart_where_preflight_refuses_the_layout(
    world: Callable[..., Any], tmp_path: Path, spec: ArchSpec, make_batches: Any
) -> None:
    """LAY6: TP2 with ETP1 and EP1 gives every rank whole experts, and each trains them on its own tokens."""
    layout = MegatronLayout(tp=2, sequence_parallel=True)
    assert [problem.rule for problem in layout_problems(Layout(2, tp=2, sequence_parallel=True), spec)] == [
        "LAY6"
    ]
    settings = replace(SETTINGS, train_mtp=False)
    how = {"spec": spec, "settings": settings, "layout": layout, "batches": make_batches(spec, 3)}
    results = world(2, tmp_path / "two", {"drift": ("drift", how)})
    assert results[0]["drift"] == 0 and results[1]["drift"] > 1e-3


def of_one_length(batch: TrainBatch) -> TrainBatch:
    """Four sequences of the most frequent length, all trained on."""
    lengths, counts = np.unique(batch.lengths, return_counts=True)
    common = int(lengths[counts.argmax()])
    found = batch.select((np.flatnonzero(batch.lengths == common).tolist() * 4)[:4])
    return replace(found, advantages=np.ones(4 * common, dtype=np.float32))


def test_an_interleaved_pipeline_of_two_stages_is_wrong_where_preflight_refuses_it(
    world: Callable[..., Any], tmp_path: Path, spec: ArchSpec, make_batches: Any
) -> None:
    """LAY7: both stages are each other's neighbour on both sides; messages of one batch are mixed up, those
    that overlap are not.
    """
    deep = replace(spec, layers=(*spec.layers, spec.layers[-1]))
    refused = Layout(2, pp=2, virtual_stage_layers=1)
    assert "LAY7" in [problem.rule for problem in layout_problems(refused, deep)]
    settings = TrainerSettings(optimizer=SETTINGS.optimizer, micro_batch_size=1, probe_tokens=0)
    batches = [of_one_length(batch) for batch in make_batches(deep, 1)]
    how = {"spec": deep, "settings": settings, "batches": batches}
    layout = MegatronLayout(pp=2, virtual_stage_layers=1)
    cases = {
        name: ("interleaved", how | {"layout": layout, "overlap": name == "overlap"})
        for name in ("overlap", "batch")
    }
    two = world(2, tmp_path / "two", cases)[0]
    (one,) = world(1, tmp_path / "one", {ALONE: ("train", how | {"layout": MegatronLayout()})})
    right = one[ALONE][0][0]["train/grad_norm"]
    assert two["overlap"][0]["train/grad_norm"] == pytest.approx(right, rel=1e-4)
    assert two["batch"][0]["train/grad_norm"] > 2 * right
