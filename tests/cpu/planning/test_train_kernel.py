"""What computes the trainer's hot parts is decided in the plan, with its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from miles.config import ResolvedConfig
from miles.planning import Facts, Plan, make_plan
from miles.planning.facts.compiler import CompilerFacts

Make = Callable[..., ResolvedConfig]
COMPILER = CompilerFacts("/usr/bin/c++", "AVX2")


@pytest.fixture
def plan(resolved: Make, facts: Facts) -> Callable[..., Plan]:
    """The plan of the good run with more flags, on a machine with or without a compiler."""

    def make(flags: str = "", compiler: CompilerFacts | None = COMPILER) -> Plan:
        return make_plan(resolved(flags), replace(facts, machine=replace(facts.machine, compiler=compiler)))

    return make


def test_a_machine_with_a_compiler_takes_the_kernel(plan: Callable[..., Plan]) -> None:
    made = plan()
    assert str(made.train_kernel) == "fused (AVX2)"
    rows = {row.setting: (row.value, row.rule) for row in made.derived}
    assert rows["training.train_kernel"] == ("fused", "AVX2")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--train-kernel torch", "training.train_kernel"),
        ("--dtype bf16", "the trainer computes in bf16"),
        ("--threads 2", "2 threads, the kernel has one"),
    ],
)
def test_what_the_kernel_cannot_do_torch_does(plan: Callable[..., Plan], flags: str, reason: str) -> None:
    assert str(plan(flags).train_kernel) == f"torch: {reason}"


def test_a_machine_without_a_compiler_takes_torch(plan: Callable[..., Plan]) -> None:
    assert str(plan(compiler=None).train_kernel) == "torch: no compiler"


def test_the_engine_s_format_does_not_matter(plan: Callable[..., Plan]) -> None:
    assert str(plan("--rollout-format bf16").train_kernel) == "fused (AVX2)"


def test_supervised_runs_have_it_too(plan: Callable[..., Plan]) -> None:
    assert str(plan("--loss-type sft_loss").train_kernel) == "fused (AVX2)"
