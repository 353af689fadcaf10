"""Rules on what a machine lets processes do: shared memory, files, ports, and what the shell hides."""

from __future__ import annotations

from collections.abc import Iterator

from miles.planning.findings import Found, Severity
from miles.planning.rules.rule import rule
from miles.planning.subject import Subject

GIB = 1024**3

SHARED_MEMORY_BYTES = GIB
"""Below this Ray's object store spills to disk and NCCL fails; a container has 64 MiB by default."""

OPEN_FILES = 4096
"""Ray warns below this; every connection between workers is a file."""

LARGE_WEIGHTS_BYTES = 10 * GIB
"""Weights that take longer to load than the usual interval of a health check."""


def _many_processes(subject: Subject) -> bool:
    return (subject.executor == "ray" or subject.on_gpus) and subject.config.cluster.address is None


@rule(
    "SHM1",
    Severity.WARNING,
    title="shared memory is small",
    cause="Ray's object store and NCCL exchange data through /dev/shm; where it is full, Ray falls back to "
    "disk and NCCL fails with `No space left on device`",
    fix="start the container with --shm-size=16g or --ipc=host",
    local=True,
)
def shared_memory_small(subject: Subject) -> Iterator[Found]:
    size = subject.facts.machine.shared_memory_bytes
    if _many_processes(subject) and size is not None and size < SHARED_MEMORY_BYTES:
        yield Found(f"/dev/shm has {size / 1024**2:.0f} MiB", "run.executor")


@rule(
    "ULM1",
    Severity.WARNING,
    title="few files may be open",
    cause="every connection between workers is an open file; the run ends with `Too many open files` when "
    "they are used up",
    fix="ulimit -n 65536 in the shell that starts the run",
    local=True,
)
def few_open_files(subject: Subject) -> Iterator[Found]:
    limit = subject.facts.machine.open_files
    if _many_processes(subject) and limit is not None and limit < OPEN_FILES:
        yield Found(f"ulimit -n is {limit}", "run.executor")


@rule(
    "PRT1",
    Severity.ERROR,
    title="a port is taken",
    cause="another program listens there; the server would fail after the model has been loaded",
    fix="choose another port, or end the program that has it",
    local=True,
)
def port_taken(subject: Subject) -> Iterator[Found]:
    for setting, port in subject.facts.taken_ports:
        yield Found(f"port {port} is in use", setting)


@rule(
    "ENV4",
    Severity.ERROR,
    title="the shell hides GPUs from the run",
    cause="CUDA_VISIBLE_DEVICES leaves fewer GPUs than the trainer takes of this node",
    fix="unset CUDA_VISIBLE_DEVICES, or lower --actor-num-gpus-per-node",
    local=True,
)
def gpus_hidden(subject: Subject) -> Iterator[Found]:
    shown = subject.facts.machine.variable("CUDA_VISIBLE_DEVICES")
    asked = subject.config.cluster.actor_num_gpus_per_node
    if shown is None or not subject.on_gpus or subject.config.cluster.address is not None:
        return
    visible = (
        0 if shown.strip() in ("-1", "none") else len([word for word in shown.split(",") if word.strip()])
    )
    if visible < asked:
        yield Found(
            f"CUDA_VISIBLE_DEVICES={shown} shows {visible}, the trainer takes {asked}",
            "cluster.actor_num_gpus_per_node",
        )


@rule(
    "ENV5",
    Severity.ERROR,
    title="the shell's CUDA allocator cannot give memory back",
    cause="colocated sides release memory through the CUDA virtual memory interface, which expandable "
    "segments use themselves",
    fix="take expandable_segments:True out of PYTORCH_CUDA_ALLOC_CONF",
    local=True,
)
def expandable_segments(subject: Subject) -> Iterator[Found]:
    shell, cluster = subject.facts.machine.variable("PYTORCH_CUDA_ALLOC_CONF"), subject.config.cluster
    if shell and "expandable_segments:true" in shell.lower() and subject.on_gpus and cluster.colocate:
        yield Found(f"PYTORCH_CUDA_ALLOC_CONF={shell} with colocate", "cluster.colocate")


@rule(
    "ENV6",
    Severity.ERROR,
    title="train_env_vars contradicts the plan",
    cause="the trainer alone would see another value than the engine and the exporter",
    fix="leave the variable out of train_env_vars; the run exports what it needs",
)
def trainer_variables_contradict(subject: Subject) -> Iterator[Found]:
    exports = dict(subject.scale.exports) if subject.scale else {}
    for name, value in subject.config.cluster.train_env_vars.items():
        if name in exports and str(value) != exports[name]:
            yield Found(f"{name} = {value}, the plan exports {exports[name]}", "cluster.train_env_vars")


@rule(
    "FTL1",
    Severity.WARNING,
    title="engines are checked before they can answer",
    cause="a server that still loads weights and compiles kernels does not answer; the first checks would "
    "count as failures and restart it",
    fix="set --rollout-health-check-first-wait 300",
)
def checked_too_early(subject: Subject) -> Iterator[Found]:
    tolerance, spec = subject.config.fault_tolerance, subject.spec
    if not tolerance.use_fault_tolerance or subject.config.rollout.backend != "sglang" or spec is None:
        return
    weights = 2 * spec.num_parameters()
    if weights > LARGE_WEIGHTS_BYTES and tolerance.rollout_health_check_first_wait < 60:
        yield Found(
            f"{weights / GIB:.0f} GiB of weights, first check after "
            f"{tolerance.rollout_health_check_first_wait:g} s",
            "fault_tolerance.rollout_health_check_first_wait",
        )
