"""Rules on GPUs: are there enough, and do engines lie on whole parts of nodes."""

from __future__ import annotations

from collections.abc import Iterator

from miles.planning.findings import Found, Severity
from miles.planning.hardware import gpu_kinds
from miles.planning.placement import plan_placement
from miles.planning.rules.rule import rule
from miles.planning.subject import Subject

ENGINE_SIZE = "cluster.rollout_num_gpus_per_engine"


@rule(
    "GPU1",
    Severity.ERROR,
    title="the run asks for more GPUs than there are",
    cause="Ray would keep the job pending for ever instead of refusing it",
    fix="lower the numbers, share GPUs with --colocate, or plan for the cluster it will run on: "
    "--assume-hardware 16xH100",
)
def too_few_gpus(subject: Subject) -> Iterator[Found]:
    if not subject.on_gpus or (subject.config.cluster.address is not None and subject.facts.assumed is None):
        return
    placement, hardware = plan_placement(subject.config), subject.hardware
    if placement.total_gpus > hardware.num_gpus:
        there = str(hardware) if hardware.kind else "this machine has none"
        kind = hardware.kind.name if hardware.kind else "H100"
        yield Found(
            f"{placement.arithmetic} GPUs; {there}",
            "cluster.actor_num_gpus_per_node",
            "lower the numbers, share GPUs with --colocate, or plan for the cluster it will run on: "
            f"--assume-hardware {placement.total_gpus}x{kind}",
        )


@rule(
    "GPU2",
    Severity.ERROR,
    title="engines do not divide their GPUs",
    cause="every engine takes rollout_num_gpus_per_engine GPUs; what is left over would idle",
    fix="make --rollout-num-gpus a multiple of --rollout-num-gpus-per-engine",
)
def engines_not_divided(subject: Subject) -> Iterator[Found]:
    placement = plan_placement(subject.config)
    if subject.on_gpus and placement.rollout_gpus % placement.gpus_per_engine:
        yield Found(f"{placement.rollout_gpus} GPUs in engines of {placement.gpus_per_engine}", ENGINE_SIZE)


@rule(
    "GPU3",
    Severity.ERROR,
    title="an engine does not lie on whole nodes",
    cause="an engine within a node shares it with others of its size; a larger one takes whole nodes",
    fix="use an engine size that divides the GPUs of a node, or a multiple of it",
)
def engine_across_nodes(subject: Subject) -> Iterator[Found]:
    engine, node = (
        subject.config.cluster.rollout_num_gpus_per_engine,
        subject.config.cluster.num_gpus_per_node,
    )
    if subject.on_gpus and node % engine and engine % node:
        yield Found(f"engines of {engine} GPUs on nodes of {node}", ENGINE_SIZE)


@rule(
    "GPU4",
    Severity.ERROR,
    title="colocated engines have other GPUs than the trainer",
    cause="under colocate both sides take turns on the same GPUs; slime and miles ignore --rollout-num-gpus "
    "there",
    fix="leave --rollout-num-gpus out, or --colocate",
)
def colocated_elsewhere(subject: Subject) -> Iterator[Found]:
    placement = plan_placement(subject.config)
    if subject.on_gpus and placement.colocate and placement.rollout_gpus != placement.trainer_gpus:
        yield Found(
            f"{placement.rollout_gpus} GPUs sample, {placement.trainer_gpus} train",
            "cluster.rollout_num_gpus",
        )


@rule(
    "GPU5",
    Severity.ERROR,
    title="no GPU samples",
    cause="engines have GPUs of their own unless they share the trainer's",
    fix="set --rollout-num-gpus, or --colocate",
)
def no_engine_gpus(subject: Subject) -> Iterator[Found]:
    config = subject.config
    external = bool(config.rollout.rollout_external_engine_addrs)
    if (
        config.rollout.backend == "sglang"
        and subject.on_gpus
        and not external
        and not plan_placement(config).rollout_gpus
    ):
        yield Found("rollout_num_gpus is not set", "cluster.rollout_num_gpus")


@rule(
    "GPU6",
    Severity.ERROR,
    title="a node has fewer GPUs than it is asked for",
    cause="the trainer takes actor_num_gpus_per_node GPUs of each of its nodes",
    fix="lower --actor-num-gpus-per-node and raise --actor-num-nodes",
)
def node_too_small(subject: Subject) -> Iterator[Found]:
    cluster, hardware = subject.config.cluster, subject.hardware
    asked = cluster.actor_num_gpus_per_node
    if not subject.on_gpus:
        return
    if hardware.kind is not None and asked > hardware.gpus_per_node:
        yield Found(f"{asked} GPUs on nodes of {hardware.gpus_per_node}", "cluster.actor_num_gpus_per_node")
    elif asked > cluster.num_gpus_per_node:
        yield Found(
            f"{asked} GPUs on nodes of num_gpus_per_node = {cluster.num_gpus_per_node}",
            "cluster.actor_num_gpus_per_node",
        )


@rule(
    "GPU7",
    Severity.ERROR,
    title="the engine cannot cut the model over its GPUs",
    cause="SGLang deals out attention heads over the GPUs of an engine (key-value heads may be repeated) "
    "and experts over its expert-parallel ranks",
    fix="choose an engine size that divides the heads, and --sglang-expert-parallel-size that divides the "
    "experts",
)
def engine_not_divided(subject: Subject) -> Iterator[Found]:
    spec, engine = subject.spec, subject.config.cluster.rollout_num_gpus_per_engine
    if spec is None or not subject.on_gpus or subject.config.rollout.backend != "sglang":
        return
    attention = spec.layers[0].attention
    if attention.num_heads % engine:
        yield Found(f"{attention.num_heads} attention heads over {engine} GPUs", ENGINE_SIZE)
    if attention.num_kv_heads % engine and engine % attention.num_kv_heads:
        yield Found(f"{attention.num_kv_heads} key-value heads over {engine} GPUs", ENGINE_SIZE)
    experts = engine_expert_parallel(subject)
    if engine % experts or (spec.is_moe and spec.num_experts % experts):
        yield Found(
            f"{spec.num_experts} experts over EP {experts} in engines of {engine} GPUs",
            "sglang.expert_parallel_size",
        )


def engine_expert_parallel(subject: Subject) -> int:
    """Expert-parallel size of one engine, under any of SGLang's spellings."""
    args = subject.config.sglang.server_args()
    return int(args.get("expert_parallel_size") or args.get("ep_size") or args.get("ep") or 1)


@rule(
    "GPU8",
    Severity.WARNING,
    title="an unknown kind of GPU",
    cause="the table of GPUs does not have it, so it is judged by its compute capability alone",
    fix="name the nearest kind with --assume-hardware; `miles plan hardware` lists them",
)
def unknown_gpu(subject: Subject) -> Iterator[Found]:
    kind = subject.hardware.kind
    if subject.on_gpus and kind is not None and kind.name not in gpu_kinds():
        yield Found(f"{kind.name} (compute capability {kind.sm / 10:.1f})")
