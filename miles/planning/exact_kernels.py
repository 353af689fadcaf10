"""Whether exact numerics are compiled. Both sides are, or neither: a token has other bits in torch."""

from __future__ import annotations

from collections.abc import Iterator

from miles.arch import ArchSpec, MoeSpec
from miles.arch.precision import PrecisionPolicy
from miles.config import RunConfig
from miles.planning import decode_kernel, train_kernel
from miles.planning.decode_kernel import EngineKind
from miles.planning.facts.compiler import CompilerFacts

HEAD_STEP = 16
"""Heads of such widths are whole vectors on every machine; for the training kernel they must be."""
EXPERT_STEP = 32
"""The same for both widths of experts, in whole panels."""


def exact_obstacles(
    config: RunConfig,
    engine: EngineKind,
    trainer: EngineKind,
    policy: PrecisionPolicy | None,
    compiler: CompilerFacts | None,
) -> Iterator[str]:
    """Why exact numerics cannot be compiled, if they cannot. `engine`, `trainer`: as with fast ones."""
    if config.rollout.backend != "native" or config.training.backend != "native":
        yield "trainer and engine are not both native"
    if config.algorithm.loss_type == "sft_loss":
        yield "nothing is sampled"
    yield from decode_kernel.obstacles(engine, compiler)
    yield from train_kernel.obstacles(trainer, compiler)
    if policy is not None and not (policy.rollout.is_plain and policy.training.is_plain):
        yield "weights in a quantised format"
    if engine.spec is not None:
        yield from _odd_widths(engine.spec)
    for setting, wanted in (
        ("engine.decode_kernel", config.engine.decode_kernel),
        ("training.train_kernel", config.training.train_kernel),
    ):
        if wanted == "torch":
            yield f"{setting} is torch, and exact sides compute alike"


def _odd_widths(spec: ArchSpec) -> Iterator[str]:
    for layer in dict.fromkeys(spec.layers):
        if layer.attention.head_dim % HEAD_STEP:
            yield f"heads of {layer.attention.head_dim}, not a multiple of {HEAD_STEP}"
        if isinstance(layer.mlp, MoeSpec):
            for width in (spec.hidden_size, layer.mlp.intermediate_size):
                if width % EXPERT_STEP:
                    yield f"experts of width {width}, not a multiple of {EXPERT_STEP}"
