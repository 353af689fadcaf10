"""Memory per GPU in each phase of a step: rollout, log-probs, training, weight sync."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from miles.planning.engine_memory import EnginePlan
from miles.planning.hardware import GIB
from miles.planning.layout import Layout
from miles.planning.memory import MemoryPart
from miles.planning.model_shape import ModelShape
from miles.planning.trainer_memory import (
    TrainerNumerics,
    forward_activations,
    logits,
    optimizer_bytes,
    rank_weights,
    rounded_weights,
    routes,
    state_parts,
    training_activations,
)

PROCESS_BYTES = 2 * GIB
"""Assumed for what a GPU process never gives back: CUDA context, communicators, CUDA graphs."""

BUCKETS = 2
"""Weight sync holds one bucket as it was gathered and one as it is sent."""


@dataclass(frozen=True)
class PhaseMemory:
    """One phase on one GPU of a role; `stage` names the fullest pipeline stage where there are several."""

    name: str
    role: str
    parts: tuple[MemoryPart, ...]

    @property
    def total_bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def largest(self) -> MemoryPart:
        return max(self.parts, key=lambda part: part.bytes)


@dataclass(frozen=True)
class Workload:
    """What decides the sizes of the phases, besides the model."""

    numerics: TrainerNumerics
    engine: EnginePlan | None
    max_context_len: int
    train_tokens: int
    """Tokens of a training micro-batch on one GPU."""
    log_prob_tokens: int
    replay: bool
    colocate: bool
    offload_train: bool
    offload_rollout: bool
    bucket_bytes: int
    critic: ModelShape | None = None
    """It is cut like the policy, and its micro-batches take turns with the policy's."""


def plan_phases(model: ModelShape, layout: Layout, work: Workload) -> tuple[PhaseMemory, ...]:
    """Every phase with its parts, on the pipeline stage that needs most. The layout has no problem."""
    stages = sorted({0, min(1, layout.pp - 1), layout.pp - 1})
    trainer = "GPU" if work.colocate else "trainer GPU"
    return (
        *_rollout(model, layout, work),
        _fullest("log-probs", trainer, [_log_probs(model, layout, work, stage) for stage in stages]),
        _fullest("training", trainer, [_training(model, layout, work, stage) for stage in stages]),
        _fullest("weight sync", trainer, [_sync(model, layout, work, stage) for stage in stages]),
    )


def _fullest(name: str, role: str, candidates: list[list[MemoryPart]]) -> PhaseMemory:
    phases = [PhaseMemory(name, role, tuple(parts)) for parts in candidates]
    return max(phases, key=lambda phase: phase.total_bytes)


def _process(name: str) -> MemoryPart:
    return MemoryPart(name, PROCESS_BYTES, "assumed: CUDA context, communicators, graphs")


def _rollout(model: ModelShape, layout: Layout, work: Workload) -> Iterator[PhaseMemory]:
    if work.engine is None:
        return
    parts = [*work.engine.parts(work.max_context_len), _process("engine process")]
    if work.colocate:
        parts.append(_process("trainer process"))
        if not work.offload_train:
            parts += _states(model, layout, work, 0)
    yield PhaseMemory("rollout", "GPU" if work.colocate else "engine GPU", tuple(parts))


def _states(model: ModelShape, layout: Layout, work: Workload, stage: int) -> list[MemoryPart]:
    """Weights, gradients and optimizer of the policy, its weights first, and of a critic."""
    parts = state_parts(rank_weights(model, layout, stage), layout, work.numerics)
    if work.critic is not None:
        own = rank_weights(work.critic, layout, stage)
        theirs = [part for part in state_parts(own, layout, _plain(work.numerics)) if part.bytes]
        told = f"{own.total:,} parameters: {', '.join(part.name for part in theirs)}"
        parts.append(MemoryPart("critic", sum(part.bytes for part in theirs), told))
    return parts


def _plain(numerics: TrainerNumerics) -> TrainerNumerics:
    """A critic rounds nothing."""
    return replace(numerics, fp8=False, int4_qat=False, fp8_param_gather=False)


def _log_probs(model: ModelShape, layout: Layout, work: Workload, stage: int) -> list[MemoryPart]:
    state = _states(model, layout, work, stage)
    parts = [*state, *rounded_weights(model, layout, work.numerics, stage, backward=False)]
    parts.append(forward_activations(model, layout, work.numerics, work.log_prob_tokens))
    return [*parts, *_per_token(model, layout, work, stage, work.log_prob_tokens, backward=False)]


def _training(model: ModelShape, layout: Layout, work: Workload, stage: int) -> list[MemoryPart]:
    state = _states(model, layout, work, stage)
    parts = [*state, *rounded_weights(model, layout, work.numerics, stage)]
    parts.append(training_activations(model, layout, work.numerics, stage, work.train_tokens))
    return [*parts, *_per_token(model, layout, work, stage, work.train_tokens, backward=True)]


def _per_token(
    model: ModelShape, layout: Layout, work: Workload, stage: int, tokens: int, backward: bool
) -> Iterator[MemoryPart]:
    if stage == layout.pp - 1:
        yield logits(model, layout, work.numerics, tokens, backward)
    if work.replay and model.num_moe_layers:
        yield routes(model, layout, stage, tokens)
    yield _process("trainer process")
    yield from _sleeping_engine(work)


def _sleeping_engine(work: Workload) -> Iterator[MemoryPart]:
    """What colocated engines hold while the trainer works."""
    if work.engine is None or not work.colocate:
        return
    yield _process("engine process")
    if not work.offload_rollout:
        yield from work.engine.parts(work.max_context_len)


def _sync(model: ModelShape, layout: Layout, work: Workload, stage: int) -> list[MemoryPart]:
    """Weights on both sides and two buckets; the KV cache comes back only afterwards."""
    state = _states(model, layout, work, stage)
    parts = [state[0]] if work.offload_train else state
    parts.append(
        MemoryPart(
            "buckets", BUCKETS * work.bucket_bytes, f"{BUCKETS} × {work.bucket_bytes / 1024**2:.0f} MiB"
        )
    )
    parts.append(_process("trainer process"))
    if work.colocate and work.engine is not None:
        parts.append(_process("engine process"))
        engine = work.engine
        parts += engine.weight_parts() if work.offload_rollout else engine.parts(work.max_context_len)
    return parts


def _parked(
    model: ModelShape, layout: Layout, work: Workload, numerics: TrainerNumerics, gpus_per_node: int
) -> Iterator[MemoryPart]:
    """What of a trained model lies in the host memory of a node."""
    weights, count = rank_weights(model, layout, 0), f"{gpus_per_node} GPUs"
    if numerics.optimizer_on_host or work.offload_train:
        size, formula = optimizer_bytes(weights, layout, numerics)
        yield MemoryPart("optimizer", gpus_per_node * size, f"{count} × {formula}")
    if work.offload_train:
        width = state_parts(weights, layout, numerics)[0].bytes
        yield MemoryPart("parked weights", gpus_per_node * width, f"{count} × {width:,} B")


def host_parts(
    model: ModelShape, layout: Layout, work: Workload, gpus_per_node: int, reference: bool, samples: int
) -> tuple[MemoryPart, ...]:
    """Host memory of one trainer node: what is kept or parked there, and the routes of one rollout."""
    width = state_parts(rank_weights(model, layout, 0), layout, work.numerics)[0].bytes
    parts = [*_parked(model, layout, work, work.numerics, gpus_per_node)]
    if work.critic is not None:
        theirs = _parked(work.critic, layout, work, _plain(work.numerics), gpus_per_node)
        parts += [replace(part, name=f"critic's {part.name}") for part in theirs]
    if reference:
        parts.append(
            MemoryPart("reference weights", gpus_per_node * width, f"{gpus_per_node} GPUs × {width:,} B")
        )
    if work.replay and model.num_moe_layers:
        size = samples * work.max_context_len * model.num_moe_layers * model.top_k * 2
        parts.append(
            MemoryPart(
                "routes of a rollout",
                size,
                f"{samples:,} samples × {work.max_context_len:,} tokens × {model.num_moe_layers} layers × "
                f"{model.top_k} × 2 B at most",
            )
        )
    return tuple(parts)
