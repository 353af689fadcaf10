"""Policy and critic cut over processes learn what one process teaches them, and go on in any other layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from miles.arch import ArchSpec
from miles.training.megatron.layout import MegatronLayout
from miles.training.settings import AlgorithmSettings, CriticSettings, OptimizerSettings, TrainerSettings
from tests.cpu.training.megatron.test_layouts import ALL_CUT, DEALT_OUT, LAYOUTS

pytestmark = pytest.mark.slow

SETTINGS = TrainerSettings(
    optimizer=OptimizerSettings(lr=2e-3),
    algorithm=AlgorithmSettings(advantage_estimator="ppo", gamma=0.99, lambd=0.95),
    critic=CriticSettings(lr=2e-3),
    max_tokens_per_micro_batch=40,
)
TWO = LAYOUTS | {"CP2": MegatronLayout(cp=2)}
DENSE = {"a dense model, TP2 without sequence parallelism": MegatronLayout(tp=2)}
FOUR = {
    "TP2, EP2, sequence parallelism, PP2": MegatronLayout(
        tp=2, ep=2, pp=2, sequence_parallel=True, first_stage_layers=1
    )
}
ALONE, DENSE_ALONE = "one process", "one process, dense"


@pytest.fixture(scope="module")
def outcomes(
    world: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
    spec: ArchSpec,
    dense_spec: ArchSpec,
    make_batches: Any,
) -> dict[str, Any]:
    """Results of the first and last rank by layout, and of one process."""
    root = tmp_path_factory.mktemp("critics")

    def case(model: ArchSpec, layout: MegatronLayout) -> tuple[str, dict[str, Any]]:
        batches = make_batches(model, 4)
        return "train", {"spec": model, "settings": SETTINGS, "batches": batches, "layout": layout}

    two = {name: case(spec, layout) for name, layout in TWO.items()}
    two |= {name: case(dense_spec, layout) for name, layout in DENSE.items()}
    four = {name: case(spec, layout) for name, layout in FOUR.items()}
    one = {name: case(model, MegatronLayout()) for name, model in ((ALONE, spec), (DENSE_ALONE, dense_spec))}
    found: dict[str, Any] = {}
    for size, cases in ((1, one), (2, two), (4, four)):
        ranks = world(size, root / str(size), cases)
        found |= {name: (ranks[0][name], ranks[-1][name]) for name in cases}
    return found


@pytest.mark.parametrize("layout", [*TWO, *DENSE, *FOUR])
def test_a_critic_that_is_cut_equals_a_whole_one(layout: str, outcomes: dict[str, Any]) -> None:
    (first, weights), (last, _) = outcomes[layout]
    expected, alone = outcomes[DENSE_ALONE if layout in DENSE else ALONE][0]
    assert first == last
    for step, (row, right) in enumerate(zip(first, expected, strict=True)):
        assert row.keys() == right.keys() and "train/value_loss" in row
        for name in row:
            scale = 2e-3 if name.endswith("grad_norm") else 1e-3
            assert row[name] == pytest.approx(right[name], rel=scale, abs=1e-4), (step, name)
    assert first[-1]["rollout/values"] != 0
    assert "critic.score.weight" in weights and weights.keys() == alone.keys()
    for name, tensor in weights.items():
        assert (tensor - alone[name]).abs().mean() <= 2e-5, name


@pytest.fixture(scope="module", params=[False, True], ids=["published names", "torch_dist"])
def resumed(
    world: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
    spec: ArchSpec,
    make_batches: Any,
    request: pytest.FixtureRequest,
) -> dict[str, Any]:
    """A run that saved after two rollouts, its next one, and that of other layouts from there."""
    root = tmp_path_factory.mktemp("resumed")
    batches, how = make_batches(spec, 3), {"spec": spec, "settings": SETTINGS}
    saved = root / "saved"
    saved.mkdir()
    first = LAYOUTS[DEALT_OUT if request.param else ALL_CUT]
    writes = how | {"layout": first, "batches": batches[:2], "then": batches[2:], "save": saved}
    cases: dict[str, Any] = {"whole": ("train", writes | {"dist_checkpoints": request.param})}
    for name, layout in TWO.items():
        cases[name] = ("go_on", how | {"layout": layout, "batches": batches[2:], "load": saved})
    results: dict[str, Any] = world(2, root / "two", cases)[0]
    return results


@pytest.mark.parametrize("layout", TWO)
def test_a_critic_of_one_layout_goes_on_in_any_other(layout: str, resumed: dict[str, Any]) -> None:
    rows, weights, moments = resumed[layout]
    _, expected, kept = resumed[ALL_CUT]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in moments.items())
    assert moments["critic.score.weight"].abs().max() > 0
    for row, right in zip(rows, resumed["whole"][0][2:], strict=True):
        assert row["rollout/values"] == pytest.approx(right["rollout/values"], abs=1e-4)
        assert row["train/value_loss"] == pytest.approx(right["train/value_loss"], abs=1e-4)
        assert row["train/critic_grad_norm"] == pytest.approx(right["train/critic_grad_norm"], rel=1e-3)
