"""A broken promise is traced to the first layer that differs, before any weight changes."""

from __future__ import annotations

import pytest
import torch
from alignment_support import (
    QUICKSTART,
    SPECS,
    TEMPERATURE,
    Sides,
    Traffic,
    needs_blocks,
    without_blocks,
)

from miles.models.hidden_states import first_difference
from miles.training.native.gap_watch import ALIGNMENT_BROKEN, GapWatch

TRAFFIC = Traffic(group=3, slots=4)
ODD = SPECS["odd widths"]


def event_of_a_step(sides: Sides, nudge: str | None = None, here: bool = True) -> dict | None:
    """The alignment event of one training step. `here`: the engine can be asked to read a sequence again."""
    batch = sides.roll_out(TRAFFIC, nudge)
    assert sides.engine is not None
    sides.trainer.gap_watch = GapWatch(sides.engine.rescore if here else None, True, TEMPERATURE)
    events = sides.trainer.train_step(batch).events
    return next((event for event in events if event["kind"] == ALIGNMENT_BROKEN), None)


@pytest.mark.parametrize(
    ("weight", "stage"),
    [
        ("model.layers.0.input_layernorm.weight", "layer 0 attention"),
        ("model.layers.1.self_attn.o_proj.weight", "layer 1 attention"),
        ("model.layers.1.mlp.experts.0.down_proj.weight", "layer 1 mlp"),
        ("model.layers.2.mlp.gate.weight", "layer 2 mlp"),
        ("model.norm.weight", "final norm"),
    ],
)
def test_one_ulp_in_one_weight_of_the_engine_is_traced_to_its_layer(weight: str, stage: str, exact) -> None:
    event = event_of_a_step(Sides(ODD, exact(ODD, torch.float32)), weight)
    assert event is not None and event["tokens"] > 0
    assert event["stage"] == stage
    assert event["layer"] == (int(stage.split()[1]) if stage.startswith("layer") else None)
    assert event["elements"] > 0 and 0 < event["max_abs"] < 1e-3


def test_missing_row_blocks_are_traced(exact) -> None:
    found = exact(QUICKSTART, torch.float32)
    if not needs_blocks(found):
        pytest.skip("on this machine a row's bits do not depend on the number of rows")
    event = event_of_a_step(Sides(QUICKSTART, without_blocks(found)))
    assert event is not None and event["stage"] == "layer 0 attention"


def test_equal_sides_report_nothing(exact) -> None:
    assert event_of_a_step(Sides(QUICKSTART, exact(QUICKSTART, torch.float32))) is None


def test_without_the_engine_at_hand_the_token_is_named_and_no_layer(exact) -> None:
    event = event_of_a_step(Sides(ODD, exact(ODD, torch.float32)), "model.norm.weight", here=False)
    assert (
        event is not None and event["stage"] is None and "process" in event["why"] and event["position"] >= 1
    )


def test_stages_are_compared_in_the_order_they_are_computed() -> None:
    stages = [
        "embedding",
        "layer 0 attention",
        "layer 0 mlp",
        "layer 0",
        "layer 2 attention",
        "layer 2",
        "layer 10",
        "final norm",
    ]
    one = {stage: torch.zeros(4, 3) for stage in reversed(stages)}
    for stage in stages:
        other = {name: tensor.clone() for name, tensor in one.items()}
        for later in stages[stages.index(stage) :]:
            other[later][2, 1] = 1e-30
        found = first_difference(one, other)
        assert found is not None and (found.stage, found.token, found.elements) == (stage, 2, 1)
    assert first_difference(one, one) is None
