"""Rules on the machine: memory, disk and threads."""

from __future__ import annotations

from collections.abc import Iterator

from miles.planning.engine_limits import EngineLimits
from miles.planning.findings import Found, Severity
from miles.planning.rules.rule import rule
from miles.planning.subject import Subject
from miles.planning.threads import LARGE_HIDDEN_SIZE, is_small

GIB = 1024**3


@rule(
    "MEM1",
    Severity.ERROR,
    title="the run needs more memory than this machine has",
    cause="the sum of weights, optimizer, KV cache and activations exceeds the machine's memory, so the "
    "process would be killed",
    fix="lower --rollout-max-context-len, --set engine.max_running_requests or --max-tokens-per-gpu, or "
    "take a smaller model",
    local=True,
)
def memory_exceeded(subject: Subject) -> Iterator[Found]:
    memory, machine = subject.memory, subject.facts.machine
    if memory is not None and memory.total_bytes > machine.memory_bytes:
        largest = max(memory.parts, key=lambda part: part.bytes)
        yield Found(
            f"{memory.total_bytes / GIB:.1f} GiB needed, {machine.memory_bytes / GIB:.1f} GiB there; the "
            f"largest part is {largest.name}: {largest.bytes / GIB:.1f} GiB = {largest.formula}"
        )


@rule(
    "MEM2",
    Severity.WARNING,
    title="other programs hold the memory that the run needs",
    cause="the estimate fits the machine but not what is free now",
    fix="end other programs, or lower --set engine.max_running_requests",
    local=True,
)
def memory_tight(subject: Subject) -> Iterator[Found]:
    memory, machine = subject.memory, subject.facts.machine
    if memory is not None and machine.memory_available_bytes < memory.total_bytes <= machine.memory_bytes:
        yield Found(
            f"{memory.total_bytes / GIB:.1f} GiB needed, {machine.memory_available_bytes / GIB:.1f} GiB free"
        )


def _native_limits(subject: Subject) -> EngineLimits | None:
    """SGLang sends requests back when its cache is full; the native engine lets in what is sure to fit."""
    return subject.engine_limits if subject.config.rollout.backend == "native" else None


@rule(
    "MEM8",
    Severity.ERROR,
    title="the KV cache is smaller than one request",
    cause="a request enters the engine when the cache has room for its prompt and its longest response; one "
    "that can become longer than the whole cache could never enter",
    fix="raise --sglang-max-total-tokens, or lower --rollout-max-response-len",
)
def cache_below_one_request(subject: Subject) -> Iterator[Found]:
    limits = _native_limits(subject)
    if limits is not None and limits.kv_tokens < limits.context:
        yield Found(
            f"max_total_tokens {limits.kv_tokens:,}, and a request may have {limits.context:,} tokens",
            "sglang.max_total_tokens",
            f"--sglang-max-total-tokens {limits.context}, or lower --rollout-max-response-len",
        )


@rule(
    "MEM9",
    Severity.WARNING,
    title="the KV cache bounds the batch, not max_running_requests",
    cause="room is kept for the longest response of everybody who runs, so fewer requests than asked for "
    "decode at once when responses may be that long",
    fix="raise --sglang-max-total-tokens, or lower --rollout-max-response-len to what responses need",
)
def cache_bounds_the_batch(subject: Subject) -> Iterator[Found]:
    limits = _native_limits(subject)
    if limits is None or limits.kv_tokens < limits.context:
        return
    at_once = limits.kv_tokens // limits.context
    if at_once < limits.running_requests:
        yield Found(
            f"max_total_tokens {limits.kv_tokens:,} holds {at_once:,} requests of {limits.context:,} tokens, "
            f"of {limits.running_requests:,}",
            "sglang.max_total_tokens",
        )


@rule(
    "DSK1",
    Severity.ERROR,
    title="checkpoints do not fit the disk",
    cause="a run that cannot write its checkpoint loses everything since the last one",
    fix="set --keep-checkpoints, raise --save-interval, or save elsewhere with --save DIR",
    local=True,
)
def disk_full(subject: Subject) -> Iterator[Found]:
    plan, machine = subject.checkpoints, subject.facts.machine
    if plan is not None and plan.total_bytes > machine.disk_free_bytes:
        yield Found(
            f"{plan.kept} × {_size(plan.bytes_each)} of checkpoints, but {machine.disk_path} has "
            f"{_size(machine.disk_free_bytes)} free",
            "checkpoint.save_interval",
        )


def _size(number: int) -> str:
    """MiB below one GiB: small disks and small models are there, too."""
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / 1024**2:.1f} MiB"


@rule(
    "THR1",
    Severity.WARNING,
    title="several threads for a small model",
    cause="small matrix products are slower on two threads even on an idle machine, and a spinning thread "
    "pool beside another busy process is up to 1,000 times slower",
    fix="leave --threads and OMP_NUM_THREADS out; the plan takes 1",
    local=True,
)
def threads_for_small_model(subject: Subject) -> Iterator[Found]:
    spec, threads = subject.facts.checkpoint.spec, subject.threads
    if spec is not None and is_small(spec) and threads.count > 1:
        yield Found(
            f"{threads.count} threads ({threads.rule}) for a hidden size of {spec.hidden_size} < "
            f"{LARGE_HIDDEN_SIZE}",
            "run.threads",
        )


@rule(
    "THR2",
    Severity.WARNING,
    title="more threads than cores",
    cause="threads that wait for a core spin and slow each other down",
    fix="lower --threads to the number of cores",
    local=True,
)
def threads_exceed_cores(subject: Subject) -> Iterator[Found]:
    cores, threads = subject.facts.machine.cores, subject.threads
    if threads.count > cores:
        yield Found(f"{threads.count} threads ({threads.rule}) on {cores} cores", "run.threads")


@rule(
    "ENV1",
    Severity.WARNING,
    title="the shell and the run file disagree about threads",
    cause="run.threads wins and is exported as OMP_NUM_THREADS",
    fix="unset OMP_NUM_THREADS, or leave --threads out",
    local=True,
)
def threads_contradict(subject: Subject) -> Iterator[Found]:
    shell, threads = subject.facts.machine.variable("OMP_NUM_THREADS"), subject.config.run.threads
    if shell is not None and threads is not None and shell != str(threads):
        yield Found(f"OMP_NUM_THREADS={shell}, run.threads = {threads}", "run.threads")


@rule(
    "ENV3",
    Severity.WARNING,
    title="CUDA_DEVICE_MAX_CONNECTIONS is not 1",
    cause="Megatron overlaps communication with computation only when kernels are issued through one "
    "connection",
    fix="unset CUDA_DEVICE_MAX_CONNECTIONS; the run exports what it needs",
    local=True,
)
def connections_contradict(subject: Subject) -> Iterator[Found]:
    shell = subject.facts.machine.variable("CUDA_DEVICE_MAX_CONNECTIONS")
    parallel = subject.config.parallel
    overlapped = parallel.tensor_model_parallel_size > 1 or parallel.context_parallel_size > 1
    if overlapped and shell not in (None, "1"):
        yield Found(f"CUDA_DEVICE_MAX_CONNECTIONS={shell}", "parallel.tensor_model_parallel_size")
