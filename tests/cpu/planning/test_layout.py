"""Layouts: what divides what, what megatron-core computes wrongly, and the nearest one that works."""

from __future__ import annotations

from dataclasses import replace

import pytest

from miles.arch.specs import shipped_spec
from miles.planning.layout import Layout, layout_problems
from miles.planning.nearest import nearest_layout

MOE = shipped_spec("qwen3-30b-a3b")
"""48 layers, 32 heads, 4 key-value heads, 128 experts of width 768."""
DENSE = shipped_spec("qwen3-14b")
"""40 layers, 40 heads, 8 key-value heads, MLP width 17,408."""

GOOD = Layout(world=16, tp=4, ep=8, sequence_parallel=True)


def rules(layout: Layout, spec=MOE) -> list[str]:  # type: ignore[no-untyped-def]
    return [problem.rule for problem in layout_problems(layout, spec)]


def test_the_published_layout_of_the_moe_has_no_problem() -> None:
    assert rules(GOOD) == []
    assert (GOOD.dp, GOOD.edp) == (4, 2)


@pytest.mark.parametrize(
    ("layout", "rule"),
    [
        (replace(GOOD, tp=8, ep=1, pp=4), "LAY1"),
        (replace(GOOD, ep=32), "LAY1"),
        (Layout(world=5, tp=5, sequence_parallel=True, etp=5, ep=1), "LAY2"),
        (replace(GOOD, etp=5, world=80), "LAY2"),
        (replace(GOOD, world=20, pp=5, ep=4), "LAY3"),
        (replace(GOOD, world=12, ep=3), "LAY4"),
        (replace(GOOD, sequence_parallel=False), "LAY5"),
        (Layout(world=8, ep=8, sequence_parallel=True), "LAY5"),
        (replace(GOOD, ep=1), "LAY6"),
        (replace(GOOD, pp=2, ep=8, virtual_stage_layers=12), "LAY7"),
        (replace(GOOD, virtual_stage_layers=12), "LAY3"),
        (replace(GOOD, pp=4, ep=4, first_stage_layers=11), "LAY3"),
    ],
)
def test_each_mistake_has_its_rule(layout: Layout, rule: str) -> None:
    assert rule in rules(layout)


def test_key_value_heads_may_be_fewer_than_tensor_parallel_ranks() -> None:
    """megatron-core repeats a key-value head where TP is a multiple of their number; SGLang does too."""
    assert rules(replace(GOOD, tp=8, ep=8)) == []
    assert rules(Layout(world=8, tp=8), DENSE) == []


def test_etp_below_tp_is_right_when_experts_are_spread() -> None:
    """With EP 1 the expert gradients are summed over data-parallel ranks alone, and the ranks drift apart."""
    assert rules(replace(GOOD, etp=1, ep=8)) == []
    assert rules(replace(GOOD, etp=1, ep=1)) == ["LAY6"]
    assert rules(replace(GOOD, etp=4, ep=1)) == []


def test_unequal_stages() -> None:
    layout = replace(GOOD, pp=4, ep=4, first_stage_layers=9, last_stage_layers=9)
    assert rules(layout) == []
    assert layout.stages(48) == (9, 15, 15, 9)
    assert replace(GOOD, pp=4).stages(48) == (12, 12, 12, 12)


def test_dense_models_have_no_expert_parallelism() -> None:
    assert rules(Layout(world=8, tp=2, ep=4, sequence_parallel=True), DENSE) == ["LAY4"]


def test_the_nearest_layout_changes_little_and_works() -> None:
    asked = replace(GOOD, tp=4, ep=4, sequence_parallel=False)
    near = nearest_layout(asked, MOE, fits=lambda layout: True)
    assert near == replace(asked, sequence_parallel=True)

    three_stages = replace(GOOD, pp=3, tp=1, ep=4, sequence_parallel=False)
    near = nearest_layout(three_stages, MOE, fits=lambda layout: True)
    assert near is not None
    assert rules(near) == []
    assert near.pp in (2, 4)


def test_the_nearest_layout_obeys_what_must_fit() -> None:
    near = nearest_layout(GOOD, MOE, fits=lambda layout: layout.pp >= 2)
    assert near is not None and near.pp == 2
    assert nearest_layout(GOOD, MOE, fits=lambda layout: False) is None


def test_a_layout_is_told_as_flags() -> None:
    assert GOOD.flags.startswith("--tensor-model-parallel-size 4 --pipeline-model-parallel-size 1")
    assert GOOD.flags.endswith("--expert-tensor-parallel-size 1 --sequence-parallel")
    assert str(GOOD) == "TP 4 x PP 1 x CP 1 x DP 4 with sequence parallelism · experts EP 8 x ETP 1 x DP 2"
