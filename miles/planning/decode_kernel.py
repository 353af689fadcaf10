"""What decodes in the native engine: the kernel that is compiled on this machine, or torch.

The two round differently, so a run with one is not repeated bit for bit by a run with the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from miles.arch import ArchSpec
from miles.planning.facts.compiler import CompilerFacts

FAMILIES = ("qwen2", "qwen3", "qwen3_moe", "llama")
"""Model families whose blocks the kernel has."""
COMPUTED = "fp32"
"""The number format that it computes in."""


@dataclass(frozen=True)
class KernelPlan:
    """The choice and its reason: the vector instructions of the kernel, or what stands in its way."""

    kernel: Literal["fused", "torch"]
    reason: str
    compiler: str | None = None
    """What compiles the kernel; None with torch."""

    def __str__(self) -> str:
        return f"fused ({self.reason})" if self.kernel == "fused" else f"torch: {self.reason}"


@dataclass(frozen=True)
class EngineKind:
    """What the choice depends on. `computed`: the number format of the engine's arithmetic."""

    device: str
    computed: str | None
    threads: int
    spec: ArchSpec | None
    guesses: bool
    """Speculative decoding."""
    exact_obstacle: str | None = None
    """What keeps exact numerics in torch, see `exact_kernels`; None where nothing does, and for fast ones."""


def plan_decode(wanted: str, engine: EngineKind, compiler: CompilerFacts | None) -> KernelPlan:
    """`wanted`: auto, torch or fused; the last is refused by a rule where `obstacles` has an answer."""
    if wanted == "torch":
        return KernelPlan("torch", "engine.decode_kernel")
    obstacle = next(obstacles(engine, compiler), None)
    if obstacle is not None or compiler is None:
        return KernelPlan("torch", obstacle or "")
    return KernelPlan("fused", compiler.vectors, compiler.path)


def obstacles(engine: EngineKind, compiler: CompilerFacts | None) -> Iterator[str]:
    """Why the kernel cannot be used, if it cannot."""
    if engine.device != "cpu":
        yield f"the engine is on {engine.device}"
    if engine.exact_obstacle is not None:
        yield engine.exact_obstacle
    if engine.computed != COMPUTED:
        yield f"the engine computes in {engine.computed}"
    if engine.threads > 1:
        yield f"{engine.threads} threads, the kernel has one"
    if engine.spec is None or engine.spec.family not in FAMILIES:
        family = "a model" if engine.spec is None else engine.spec.family
        yield f"{family}, which the kernel does not know"
    if engine.guesses:
        yield "speculative decoding"
    if compiler is None:
        yield "no compiler"
