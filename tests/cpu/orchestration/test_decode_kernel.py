"""A compiler that fails never stops a run: the plan that is kept says that torch decodes, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from miles.config import resolve
from miles.data.tasks import resolve_builtin
from miles.models.compiled.build import BuildFailed
from miles.orchestration import decode_kernel
from miles.orchestration.decode_kernel import decode_library, settle, train_library
from miles.orchestration.observer import SilentObserver
from miles.planning import Plan, collect_facts, make_plan
from miles.planning.decode_kernel import KernelPlan
from miles.planning.facts.compiler import read_compiler
from miles.rollout.native.fused import build as decoding
from tests.cpu.orchestration.test_kernel_probe import OtherProducts

QUICKSTART = resolve_builtin("builtin:sort")


class Listener(SilentObserver):
    def __init__(self) -> None:
        self.heard: list[tuple[str, dict[str, Any]]] = []

    def on_event(self, kind: str, fields: dict[str, Any]) -> None:
        self.heard.append((kind, fields))


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The quickstart on a machine whose compiler is broken."""
    resolved = resolve("quickstart")
    made = make_plan(resolved, collect_facts(resolved.config))
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'fatal error: no memory' >&2\nexit 4\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("MILES_CACHE_DIR", str(tmp_path / "cache"))
    fused = KernelPlan("fused", "AVX-512", str(compiler))
    return replace(made, decode=fused, train_kernel=fused)


def test_the_plan_of_the_run_says_why_torch_decodes(plan: Plan) -> None:
    listener = Listener()
    settled = settle(plan, listener, QUICKSTART)
    assert settled.decode is not None and settled.decode.kernel == "torch"
    assert "ended with 4 (fatal error: no memory)" in str(settled.decode)
    assert settled.train_kernel == settled.decode
    assert [kind for kind, _ in listener.heard] == ["kernel_not_built"] * 2
    assert decode_library(settled) is None and train_library(settled) is None


def test_a_worker_on_a_machine_whose_compiler_fails_goes_on(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    assert decode_library(plan) is None
    assert "torch decodes here" in capsys.readouterr().err
    assert train_library(plan) is None
    assert "torch trains here" in capsys.readouterr().err


def test_a_plan_with_torch_is_left_alone(plan: Plan) -> None:
    in_torch = KernelPlan("torch", "no compiler")
    torch_plan = replace(plan, decode=in_torch, train_kernel=in_torch)
    assert settle(torch_plan, SilentObserver(), QUICKSTART) is torch_plan
    assert decode_library(torch_plan) is None


def test_exact_sides_fall_back_together(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel compiles and the other does not: neither is used, and a worker does not go on alone."""
    exact = replace(plan, numerics="exact")
    monkeypatch.setattr(decoding, "library", lambda compiler: Path("decode.so"))
    settled = settle(exact, SilentObserver(), QUICKSTART)
    assert settled.decode == settled.train_kernel
    assert settled.decode is not None and settled.decode.kernel == "torch"
    with pytest.raises(BuildFailed):
        train_library(exact)


def test_kernels_that_part_are_left_by_name(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both compile, and a probe finds that they part: both sides are torch's, and the plan says why."""
    compiler = read_compiler()
    if compiler is None:
        pytest.skip("no compiler")
    monkeypatch.undo()
    fused = KernelPlan("fused", compiler.vectors, compiler.path)
    exact = replace(plan, numerics="exact", decode=fused, train_kernel=fused)
    assert settle(exact, SilentObserver(), QUICKSTART) is exact
    monkeypatch.setattr(decode_kernel, "CompiledExactNumerics", OtherProducts)
    listener = Listener()
    settled = settle(exact, listener, QUICKSTART)
    assert settled.decode == settled.train_kernel
    assert "torch: compiled kernels are not exact on this machine: trainer and engine part" in str(
        settled.decode
    )
    assert [kind for kind, _ in listener.heard] == ["kernel_not_exact"]
    assert train_library(settled) is None and decode_library(settled) is None
