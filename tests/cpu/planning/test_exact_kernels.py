"""Exact numerics are compiled on both sides or on neither, and the plan says why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from miles.arch import MoeSpec
from miles.config import ResolvedConfig
from miles.planning import Facts, Plan, make_plan
from miles.planning.facts.compiler import CompilerFacts
from miles.planning.findings import PlanRefused

Make = Callable[..., ResolvedConfig]
COMPILER = CompilerFacts("/usr/bin/c++", "AVX2")


@pytest.fixture
def plan(resolved: Make, facts: Facts) -> Callable[..., Plan]:
    """The plan of the good run in true on-policy mode with more flags; `widths` of heads and experts."""

    def make(
        flags: str = "", compiler: CompilerFacts | None = COMPILER, head: int = 16, expert: int = 64
    ) -> Plan:
        spec = facts.checkpoint.spec
        assert spec is not None
        layers = []
        for layer in spec.layers:
            mlp = layer.mlp
            if isinstance(mlp, MoeSpec):
                mlp = replace(mlp, intermediate_size=expert)
            layers.append(replace(layer, attention=replace(layer.attention, head_dim=head), mlp=mlp))
        checkpoint = replace(facts.checkpoint, spec=replace(spec, layers=tuple(layers)))
        machine = replace(facts.machine, compiler=compiler)
        found = replace(facts, machine=machine, checkpoint=checkpoint)
        return make_plan(resolved(f"--true-on-policy-mode {flags}"), found)

    return make


def kernels(plan: Plan) -> tuple[str, str]:
    return str(plan.decode), str(plan.train_kernel)


def test_both_sides_take_the_kernel(plan: Callable[..., Plan]) -> None:
    made = plan()
    assert made.numerics == "exact" and kernels(made) == ("fused (AVX2)", "fused (AVX2)")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--dtype bf16", "the engine computes in bf16"),
        ("--threads 2", "2 threads, the kernel has one"),
        ("--int4-qat --rollout-format int4", "weights in a quantised format"),
        ("--sglang-speculative-algorithm NGRAM", "speculative decoding"),
    ],
)
def test_what_one_side_cannot_do_neither_does(plan: Callable[..., Plan], flags: str, reason: str) -> None:
    assert kernels(plan(flags)) == (f"torch: {reason}",) * 2


def test_torch_on_one_side_is_torch_on_both(plan: Callable[..., Plan]) -> None:
    because = "{} is torch, and exact sides compute alike"
    assert kernels(plan("--decode-kernel torch")) == (
        "torch: engine.decode_kernel",
        f"torch: {because.format('engine.decode_kernel')}",
    )
    assert kernels(plan("--train-kernel torch")) == (
        f"torch: {because.format('training.train_kernel')}",
        "torch: training.train_kernel",
    )


def test_one_of_each_is_refused(plan: Callable[..., Plan]) -> None:
    with pytest.raises(PlanRefused, match=r"training\.train_kernel is torch"):
        plan("--decode-kernel fused --train-kernel torch")


def test_no_compiler(plan: Callable[..., Plan]) -> None:
    assert kernels(plan(compiler=None)) == ("torch: no compiler",) * 2


def test_widths_that_are_no_whole_vectors(plan: Callable[..., Plan]) -> None:
    assert kernels(plan(head=24)) == ("torch: heads of 24, not a multiple of 16",) * 2
    assert kernels(plan(expert=40)) == ("torch: experts of width 40, not a multiple of 32",) * 2


def test_supervised_runs_are_exact_in_torch(plan: Callable[..., Plan], resolved: Make) -> None:
    made = plan("--loss-type sft_loss")
    assert made.decode is None and str(made.train_kernel) == "torch: nothing is sampled"
