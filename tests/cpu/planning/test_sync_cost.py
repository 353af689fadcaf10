"""Weight updates at scale: bytes follow the layout, and the lower bound lies below what was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from miles.arch.specs import shipped_spec
from miles.planning.layout import Layout
from miles.planning.model_shape import model_shape
from miles.planning.scale_page import STUDIES, plan_at, scale_page
from miles.planning.sync_cost import NETWORK_BYTES, PUBLISHED, SyncShape, fan_out, sync_cost

MODEL = model_shape(shipped_spec("qwen3-30b-a3b"))
SHAPE = SyncShape(MODEL, Layout(world=16, pp=4, ep=4), "bf16", "bf16", engines=2, gpus_per_engine=8)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.model)
def test_the_bound_lies_below_what_was_measured_and_not_far(row) -> None:  # type: ignore[no-untyped-def]
    assert row.bound_ms <= row.broadcast_ms <= 2.5 * row.bound_ms


def test_a_broadcast_gives_every_engine_gpu_the_whole_model() -> None:
    cost = sync_cost(SHAPE, "broadcast")
    assert cost.slowest.what == "every engine GPU receives the model"
    assert cost.slowest.bytes == 2 * MODEL.total
    assert cost.seconds == pytest.approx(2 * MODEL.total / NETWORK_BYTES)


def test_point_to_point_gives_it_its_part() -> None:
    assert sync_cost(SHAPE, "point-to-point").slowest.bytes == 2 * MODEL.total // 8


def test_more_engines_than_trainers_make_sending_the_slowest_part() -> None:
    many = replace(SHAPE, engines=32)
    assert sync_cost(many, "point-to-point").slowest.what == "every trainer GPU sends its share"


def test_a_ring_carries_the_model_once_however_many_servers_there_are() -> None:
    """A group of each server costs the sender a copy for each, gloo's tree one for each doubling."""
    few, many = (fan_out(replace(SHAPE, engines=engines), 2 * 1024**3) for engines in (2, 64))
    once = SHAPE.wire_bytes / NETWORK_BYTES
    assert (few.per_server, many.per_server) == (2 * once, 64 * once)
    assert (few.binomial, many.binomial) == (5 * once, 10 * once)
    assert few.ring < many.ring < 1.06 * once
    assert fan_out(SHAPE, 1024**2).ring > 2 * few.ring, "a bucket is there when its last chunk went round"


def test_the_first_rank_gathers_what_its_node_does_not_hold() -> None:
    assert fan_out(replace(SHAPE, layout=Layout(world=8, ep=8)), 1024**3).gathered == 0
    assert fan_out(SHAPE, 1024**3).gathered == pytest.approx(MODEL.stored_bytes("bf16") / 2 / NETWORK_BYTES)


def test_gathering_follows_the_layout() -> None:
    def gathered(layout: Layout) -> dict[str, int]:
        return {load.what: load.bytes for load in sync_cost(replace(SHAPE, layout=layout), "broadcast").loads}

    assert "gather over TP" not in gathered(Layout(world=16, pp=4, ep=4))
    stage = 2 * MODEL.experts / 4
    assert gathered(Layout(world=16, pp=4, ep=4))["gather over EP"] == pytest.approx(stage * 3 / 4, rel=1e-6)
    wide = gathered(Layout(world=64, pp=4, ep=16))
    assert wide["gather over EP between nodes"] == pytest.approx(stage * 8 / 16, rel=1e-6)


def test_colocated_engines_take_from_their_own_node_what_it_holds() -> None:
    whole = sync_cost(replace(SHAPE, layout=Layout(world=8, ep=8)), "colocated")
    assert [load.link for load in whole.loads] == ["NVLink"]
    half = {load.link: load.bytes for load in sync_cost(SHAPE, "colocated").loads}
    assert half["NVLink"] == half["network"]


def test_a_delta_update_sends_its_share() -> None:
    tenth = replace(SHAPE, changed=0.1)
    assert tenth.wire_bytes == pytest.approx(SHAPE.wire_bytes / 10, rel=1e-6)


def test_fp8_halves_what_is_sent() -> None:
    assert 1.9 < SHAPE.wire_bytes / replace(SHAPE, sent="fp8").wire_bytes < 2


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.title)
def test_every_study_fits_a_thousand_gpus(study) -> None:  # type: ignore[no-untyped-def]
    plan = plan_at(study, 1024)
    assert plan is not None and plan.layout.world == 1024
    assert all(phase.total_bytes < plan.gpu_bytes for phase in plan.phases)


def test_the_page_is_up_to_date() -> None:
    page = Path(__file__).parents[3] / "docs/reference/scale.md"
    assert page.read_text() == scale_page(), "run python -m miles_cli.docs"
