"""What decodes is decided in the plan, with its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from miles.config import ResolvedConfig
from miles.planning import Facts, Plan, make_plan
from miles.planning.facts.compiler import CompilerFacts

Make = Callable[..., ResolvedConfig]
COMPILER = CompilerFacts("/usr/bin/c++", "AVX-512")


@pytest.fixture
def plan(resolved: Make, facts: Facts) -> Callable[..., Plan]:
    """The plan of the good run with more flags, on a machine with or without a compiler."""

    def make(flags: str = "", compiler: CompilerFacts | None = COMPILER) -> Plan:
        return make_plan(resolved(flags), replace(facts, machine=replace(facts.machine, compiler=compiler)))

    return make


def test_a_machine_with_a_compiler_takes_the_kernel(plan: Callable[..., Plan]) -> None:
    decode = plan().decode
    assert str(decode) == "fused (AVX-512)"
    assert decode is not None and decode.compiler == "/usr/bin/c++"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--decode-kernel torch", "engine.decode_kernel"),
        ("--true-on-policy-mode --dtype bf16", "the engine computes in bf16"),
        ("--dtype bf16", "the engine computes in bf16"),
        ("--rollout-format bf16", "the engine computes in bf16"),
        ("--threads 2", "2 threads, the kernel has one"),
    ],
)
def test_what_the_kernel_cannot_do_torch_does(plan: Callable[..., Plan], flags: str, reason: str) -> None:
    assert str(plan(flags).decode) == f"torch: {reason}"


def test_a_machine_without_a_compiler_takes_torch(plan: Callable[..., Plan]) -> None:
    assert str(plan(compiler=None).decode) == "torch: no compiler"


def test_int4_weights_are_computed_in_fp32_and_fp8_rounds_activations_too(plan: Callable[..., Plan]) -> None:
    assert str(plan("--int4-qat --rollout-format int4").decode) == "fused (AVX-512)"
    assert str(plan("--rollout-format fp8").decode) == "torch: the engine computes in fp8"


def test_a_supervised_run_decodes_nothing(plan: Callable[..., Plan]) -> None:
    assert plan("--loss-type sft_loss").decode is None


def test_the_packed_weights_are_in_the_memory_plan(plan: Callable[..., Plan]) -> None:
    with_kernel, without = plan().memory, plan("--decode-kernel torch").memory
    (part,) = [part for part in with_kernel.parts if part.name == "decode kernel"]
    assert with_kernel.total_bytes - without.total_bytes == part.bytes > 0


def test_an_engine_in_a_process_of_its_own_has_weights_of_its_own(plan: Callable[..., Plan]) -> None:
    shares, apart = (
        {part.name: part for part in plan(flags).memory.parts} for flags in ("", "--executor ray")
    )
    assert "share" in shares["weights"].formula and "engine weights" not in shares
    assert "share" not in apart["weights"].formula
    assert apart["engine weights"].bytes == apart["weights"].bytes


def test_the_choice_is_a_derived_value_with_its_rule(plan: Callable[..., Plan]) -> None:
    rows = {row.setting: row for row in plan().derived}
    assert (rows["engine.decode_kernel"].value, rows["engine.decode_kernel"].rule) == ("fused", "AVX-512")
