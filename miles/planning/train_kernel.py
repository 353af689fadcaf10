"""What computes the hot parts of a training step in the native trainer: the kernel that is compiled on this
machine, or torch. With fast numerics it computes attention of short sequences, narrow experts and norms, and
torch the rest; with exact ones every forward.

The two round differently, so a run with one is not repeated bit for bit by a run with the other.
"""

from __future__ import annotations

from collections.abc import Iterator

from miles.planning.decode_kernel import COMPUTED, EngineKind, KernelPlan
from miles.planning.facts.compiler import CompilerFacts


def plan_train_kernel(wanted: str, trainer: EngineKind, compiler: CompilerFacts | None) -> KernelPlan:
    """`wanted`: auto, torch or fused; the last is refused by a rule where `obstacles` has an answer.
    `trainer.computed`: the number format of the trainer's arithmetic."""
    if wanted == "torch":
        return KernelPlan("torch", "training.train_kernel")
    obstacle = next(obstacles(trainer, compiler), None)
    if obstacle is not None or compiler is None:
        return KernelPlan("torch", obstacle or "")
    return KernelPlan("fused", compiler.vectors, compiler.path)


def obstacles(trainer: EngineKind, compiler: CompilerFacts | None) -> Iterator[str]:
    """Why the kernel cannot be used, if it cannot."""
    if trainer.device != "cpu":
        yield f"the trainer is on {trainer.device}"
    if trainer.exact_obstacle is not None:
        yield trainer.exact_obstacle
    if trainer.computed != COMPUTED:
        yield f"the trainer computes in {trainer.computed}"
    if trainer.threads > 1:
        yield f"{trainer.threads} threads, the kernel has one"
    if compiler is None:
        yield "no compiler"
