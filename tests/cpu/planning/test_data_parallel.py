"""Several trainer ranks: where they run, and what they need."""

from __future__ import annotations

import pytest

from miles.planning import PlanRefused, make_plan


@pytest.mark.parametrize("executor", ["", "--executor ray"])
def test_ranks_take_the_ray_executor_and_a_processor_each(executor, resolved, facts) -> None:
    plan = make_plan(resolved(f"--data-parallel-size 3 {executor}"), facts)
    assert plan.executor == "ray"
    assert plan.workers is not None and plan.workers.trainers == 3
    assert "trainers 3 × 1" in plan.workers.arithmetic


def test_one_process_is_no_place_for_two_ranks(resolved, facts) -> None:
    with pytest.raises(PlanRefused) as refused:
        make_plan(resolved("--data-parallel-size 2 --executor inline"), facts)
    (finding,) = refused.value.findings
    assert finding.rule == "CAP1" and "ray" in finding.fix


def test_one_rank_stays_inline(resolved, facts) -> None:
    assert make_plan(resolved("--data-parallel-size 1"), facts).executor == "inline"
