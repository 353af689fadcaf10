"""Rules on the memory of GPUs and of the nodes that hold them."""

from __future__ import annotations

from collections.abc import Iterator

from miles.planning.findings import Found, Severity
from miles.planning.hardware import GIB
from miles.planning.memory import MemoryPart
from miles.planning.rules.layout import nearest_fix
from miles.planning.rules.rule import rule
from miles.planning.scale import COMFORT
from miles.planning.subject import Subject

REMEDIES = {
    "KV cache": "lower --sglang-mem-fraction-static",
    "engine weights": "raise --rollout-num-gpus-per-engine, or take a smaller --rollout-format",
    "logits": "raise --tensor-model-parallel-size, set --log-probs-chunk-size 1024, or lower "
    "--max-tokens-per-gpu",
    "activations": "use --recompute-granularity full --recompute-method uniform --recompute-num-layers 1, "
    "or lower --max-tokens-per-gpu",
    "optimizer": "use --use-distributed-optimizer, or --optimizer-cpu-offload",
    "gradients": "raise the tensor, pipeline or expert parallel size",
    "weights": "raise the tensor, pipeline or expert parallel size",
    "FP8 weights": "raise the tensor, pipeline or expert parallel size",
    "buckets": "lower --update-weight-buffer-size",
}
"""What makes each part smaller."""


@rule(
    "MEM3",
    Severity.ERROR,
    title="a phase does not fit the GPU",
    cause="the sum of what the phase holds at once exceeds the memory of one GPU, so it would end out of "
    "memory",
    fix="make its largest part smaller",
)
def phase_too_large(subject: Subject) -> Iterator[Found]:
    scale = subject.scale
    for phase in scale.phases if scale else ():
        if scale is not None and phase.total_bytes > scale.gpu_bytes:
            near = nearest_fix(subject) if phase.name != "rollout" else ""
            yield Found(
                f"{phase.name}: {_gib(phase.total_bytes)} of {_gib(scale.gpu_bytes)} GiB per {phase.role}; "
                f"the largest part is {_told(phase.largest)}",
                _setting(phase.largest),
                "; ".join(filter(None, (REMEDIES.get(phase.largest.name, ""), near))),
            )


@rule(
    "MEM4",
    Severity.WARNING,
    title="a phase nearly fills the GPU",
    cause="fragmentation, uneven routing and what the arithmetic leaves out need room too",
    fix="make its largest part smaller",
)
def phase_tight(subject: Subject) -> Iterator[Found]:
    scale = subject.scale
    for phase in scale.phases if scale else ():
        if scale is not None and COMFORT * scale.gpu_bytes < phase.total_bytes <= scale.gpu_bytes:
            yield Found(
                f"{phase.name}: {_gib(phase.total_bytes)} of {_gib(scale.gpu_bytes)} GiB per {phase.role}; "
                f"the largest part is {_told(phase.largest)}",
                _setting(phase.largest),
                REMEDIES.get(phase.largest.name, ""),
            )


@rule(
    "MEM5",
    Severity.ERROR,
    title="the engine's share of the GPU is too small",
    cause="the static share holds the engine's weights and its KV cache; an engine that fails for this when "
    "it starts needs a larger share, one that fails while it runs a smaller one",
    fix="raise --sglang-mem-fraction-static, or --rollout-num-gpus-per-engine",
)
def static_share_too_small(subject: Subject) -> Iterator[Found]:
    scale, context = subject.scale, subject.max_context_len
    engine = scale.engine if scale else None
    if engine is None or context is None:
        return
    setting = "sglang.mem_fraction_static"
    if engine.cache_bytes < 0:
        yield Found(
            f"{_gib(engine.weight_bytes)} GiB of weights on each of {engine.gpus} GPUs, the share is "
            f"{_gib(engine.static_bytes)} GiB",
            setting,
        )
    elif engine.cache_tokens < context:
        yield Found(
            f"the KV cache holds {engine.cache_tokens:,} tokens, one sequence may have {context:,}", setting
        )


@rule(
    "MEM6",
    Severity.ERROR,
    title="a node has too little host memory",
    cause="offloaded optimizer state and weights lie in host memory; the system ends the process that takes "
    "the last of it, often after many steps",
    fix="offload less (--no-offload-train, --no-optimizer-cpu-offload), or spread the run over more nodes",
    local=True,
)
def host_too_small(subject: Subject) -> Iterator[Found]:
    scale, memory = subject.scale, subject.facts.machine.memory_bytes
    parts = scale.host if scale and subject.config.cluster.address is None else ()
    if sum(part.bytes for part in parts) > memory:
        largest = max(parts, key=lambda part: part.bytes)
        yield Found(
            f"{_gib(sum(part.bytes for part in parts))} of {_gib(memory)} GiB; the largest part is "
            f"{_told(largest)}",
            "optimizer.optimizer_cpu_offload",
        )


@rule(
    "MEM7",
    Severity.WARNING,
    title="one sample may exceed the token budget",
    cause="a sample is never split over micro-batches, so a long one makes a larger micro-batch than the "
    "budget says; memory is planned for it",
    fix="raise --max-tokens-per-gpu or --context-parallel-size, or lower --rollout-max-response-len",
)
def sample_exceeds_budget(subject: Subject) -> Iterator[Found]:
    training, context, scale = subject.config.training, subject.max_context_len, subject.scale
    if (
        scale is None
        or context is None
        or not training.use_dynamic_batch_size
        or not training.max_tokens_per_gpu
    ):
        return
    share = -(-context // scale.layout.cp)
    if share > training.max_tokens_per_gpu:
        over = f" over CP {scale.layout.cp}" if scale.layout.cp > 1 else ""
        yield Found(
            f"{context:,} tokens at most{over}, {training.max_tokens_per_gpu:,} per micro-batch",
            "training.max_tokens_per_gpu",
        )


SETTINGS = {
    "KV cache": "sglang.mem_fraction_static",
    "engine weights": "cluster.rollout_num_gpus_per_engine",
    "logits": "training.max_tokens_per_gpu",
    "activations": "training.max_tokens_per_gpu",
    "buckets": "weight_sync.update_weight_buffer_size",
}


def _setting(part: MemoryPart) -> str:
    return SETTINGS.get(part.name, "parallel.tensor_model_parallel_size")


def _told(part: MemoryPart) -> str:
    return f"{part.name}: {_gib(part.bytes)} GiB = {part.formula}"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
