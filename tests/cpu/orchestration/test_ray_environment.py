"""What is set before ray is imported, and what is said when it cannot be."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from miles import environment
from miles.errors import ExitCode, Unavailable
from miles.orchestration.ray_environment import load_ray, prepare_client, prepare_private_runtime
from miles.orchestration.ray_runtime import STARTS, RayRuntime
from miles.planning import Plan

VARIABLES = (
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_USAGE_STATS_ENABLED",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
)


@pytest.fixture(autouse=True)
def bare_shell(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """None of the variables is set, and none of those set here outlives the test."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


def test_a_missing_ray_is_exit_four_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Unavailable, match=r"pip install 'miles\[ray\]'") as caught:
        load_ray()
    assert caught.value.exit_code is ExitCode.UNAVAILABLE


def test_a_private_runtime_gets_a_token_of_its_own_and_loopback_only() -> None:
    prepare_private_runtime()
    assert environment.get("RAY_AUTH_MODE") == "token"
    assert len(environment.get("RAY_AUTH_TOKEN") or "") >= 32
    assert environment.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") == "0"


def test_a_client_sends_the_token_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_client()
    assert environment.get("RAY_AUTH_MODE") is None
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    prepare_client()
    assert environment.get("RAY_AUTH_MODE") == "token"


class SlowRay:
    """Ray on a machine that is too busy for its first `failures` starts."""

    def __init__(self, failures: int) -> None:
        self._failures = failures
        self.homes: list[str] = []
        self.calls: list[str] = []

    def init(self, address: str, _temp_dir: str = "", **_: object) -> None:
        self.calls.append(f"init {address}")
        self.homes.append(_temp_dir)
        if len(self.homes) <= self._failures:
            raise Exception("The current node timed out during startup. More of it.\nAnd more.")

    def shutdown(self) -> None:
        self.calls.append("shutdown")


PLAN = cast(
    Plan, SimpleNamespace(workers=None, device="cpu", dtype="fp32", model=SimpleNamespace(parameters=1))
)


def test_a_job_that_cannot_reach_its_cluster_is_unavailable_not_a_defect() -> None:
    with pytest.raises(Unavailable, match="cannot reach its own cluster") as caught:
        RayRuntime(in_cluster=True)._connect(SlowRay(1), PLAN, unheard)
    assert "timed out" in caught.value.why


def test_a_private_runtime_that_does_not_come_up_is_ended_and_started_anew() -> None:
    ray, told = SlowRay(2), []
    RayRuntime(in_cluster=False)._connect(ray, PLAN, lambda kind, **fields: told.append((kind, fields)))
    assert ray.calls == ["init local", "shutdown", "init local", "shutdown", "init local"]
    assert [(kind, fields["restarts_left"]) for kind, fields in told] == [
        ("restart_failed", 2),
        ("restart_failed", 1),
    ]
    assert [Path(home).exists() for home in ray.homes] == [False, False, True]
    shutil.rmtree(ray.homes[-1])


def test_a_private_runtime_that_never_comes_up_is_unavailable() -> None:
    runtime, ray = RayRuntime(in_cluster=False), SlowRay(STARTS)
    with pytest.raises(Unavailable, match="Ray did not start"):
        runtime._connect(ray, PLAN, lambda *_, **__: None)
    runtime._end_private(ray)
    assert not any(Path(home).exists() for home in ray.homes)


def unheard(kind: str, **fields: object) -> None:
    raise AssertionError((kind, fields))
