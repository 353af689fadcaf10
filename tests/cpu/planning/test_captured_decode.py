"""How many requests a captured decode step takes by the plan; on a CPU its settings are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from miles.config import ResolvedConfig
from miles.planning import Facts, PlanRefused, make_plan
from miles.planning.engine_limits import plan_engine_limits


@pytest.mark.parametrize(
    ("flags", "captured"),
    [
        ("", 24),
        ("--sglang-cuda-graph-max-bs-decode 8", 8),
        ("--sglang-cuda-graph-max-bs-decode 100", 24),
        ("--sglang-disable-cuda-graph", 0),
        ("--rollout-backend sglang", 0),
    ],
)
def test_steps_of_all_running_requests_are_captured_on_gpus(
    resolved: Callable[..., ResolvedConfig], flags: str, captured: int
) -> None:
    config = resolved(f"--max-running-requests 24 {flags}").config
    assert plan_engine_limits(config, 64, on_gpus=True).captured_requests == captured
    assert plan_engine_limits(config, 64).captured_requests == 0


@pytest.mark.parametrize("flag", ["--sglang-disable-cuda-graph", "--sglang-cuda-graph-max-bs-decode 8"])
def test_a_cpu_has_no_graphs_to_speak_of(
    resolved: Callable[..., ResolvedConfig], facts: Facts, flag: str
) -> None:
    with pytest.raises(PlanRefused) as caught:
        make_plan(resolved(flag), facts)
    assert [finding.rule for finding in caught.value.findings] == ["CAP1"]
