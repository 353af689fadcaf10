"""Rules on the parallel layout: what does not divide, and what megatron-core computes wrongly."""

from __future__ import annotations

from collections.abc import Iterator

from miles.arch import with_mtp
from miles.arch.megatron import megatron_obstacle
from miles.planning.findings import Found, Severity
from miles.planning.layout import layout_problems
from miles.planning.rules.rule import rule
from miles.planning.scale import plan_layout
from miles.planning.speculation import mtp_layers
from miles.planning.subject import Subject


def _problems(subject: Subject, rule_id: str) -> Iterator[Found]:
    """What the layout of the Megatron trainer breaks of one rule, with the nearest layout that works."""
    spec = subject.spec
    if subject.config.training.backend != "megatron" or spec is None:
        return
    layout = plan_layout(subject.config)
    problems = [problem for problem in layout_problems(layout, spec) if problem.rule == rule_id]
    fix = nearest_fix(subject) if problems else ""
    for problem in problems:
        yield Found(problem.what, problem.setting, fix)


def _in_transformer_engine(subject: Subject) -> bool:
    """Whether the Megatron trainer takes Transformer Engine's layers."""
    asked = subject.config.training.transformer_impl
    return subject.on_gpus if asked is None else asked == "transformer_engine"


def nearest_fix(subject: Subject) -> str:
    """The nearest layout that works, as flags; empty where the run is not on GPUs."""
    if subject.scale_request is None:
        return ""
    ranks, near = plan_layout(subject.config).world, subject.working_layout
    if near is not None and near.world == ranks:
        return f"the nearest layout that works: {near.flags} (DP {near.dp})"
    gpus = f"{ranks} {subject.hardware.kind.name}" if subject.hardware.kind else f"{ranks} GPUs"
    if near is None:
        return f"no layout over {gpus} works, nor over 64 times as many: change model or batch"
    return f"no layout over {gpus} works; over {near.world} does: {near.flags}"


@rule(
    "LAY1",
    Severity.ERROR,
    title="the parallel sizes do not divide the ranks",
    cause="TP x PP x CP ranks hold one replica of the model, and ETP x EP x PP ranks one set of experts; "
    "both must divide the number of trainer GPUs",
    fix="choose sizes whose product divides nodes x GPUs per node",
)
def ranks_not_divided(subject: Subject) -> Iterator[Found]:
    yield from _problems(subject, "LAY1")


@rule(
    "LAY2",
    Severity.ERROR,
    title="tensor parallelism does not divide the model",
    cause="heads and MLP columns are dealt out whole to tensor-parallel ranks (key-value heads may be "
    "repeated)",
    fix="choose a tensor-parallel size that divides heads and widths",
)
def model_not_divided(subject: Subject) -> Iterator[Found]:
    yield from _problems(subject, "LAY2")


@rule(
    "LAY3",
    Severity.ERROR,
    title="pipeline stages do not divide the layers",
    cause="every stage has the same number of layers unless the first or last is set, and virtual stages "
    "divide it",
    fix="choose another --pipeline-model-parallel-size, or set --decoder-first-pipeline-num-layers and "
    "--decoder-last-pipeline-num-layers",
)
def layers_not_divided(subject: Subject) -> Iterator[Found]:
    yield from _problems(subject, "LAY3")


@rule(
    "LAY4",
    Severity.ERROR,
    title="expert parallelism does not divide the experts",
    cause="every expert-parallel rank holds the same number of experts; a dense model has none",
    fix="choose an --expert-model-parallel-size that divides the number of experts",
)
def experts_not_divided(subject: Subject) -> Iterator[Found]:
    yield from _problems(subject, "LAY4")


@rule(
    "LAY5",
    Severity.ERROR,
    title="sequence parallelism does not fit tensor parallelism",
    cause="Megatron refuses an MoE model with tensor parallelism but without sequence parallelism in "
    "training, and sequence parallelism without tensor parallelism always",
    fix="use --sequence-parallel exactly when --tensor-model-parallel-size is above 1",
)
def sequence_parallel_mismatch(subject: Subject) -> Iterator[Found]:
    yield from _problems(subject, "LAY5")


@rule(
    "LAY6",
    Severity.ERROR,
    title="this layout trains experts wrongly without saying so",
    cause="with EP 1 Megatron sums expert gradients over data-parallel ranks alone, though each "
    "tensor-parallel rank saw other tokens: the copies of an expert drift apart (measured: 0.06 after three "
    "steps)",
    fix="set --expert-tensor-parallel-size to the tensor-parallel size, or --expert-model-parallel-size "
    "above 1",
)
def experts_drift_apart(subject: Subject) -> Iterator[Found]:
    yield from _problems(subject, "LAY6")


@rule(
    "LAY7",
    Severity.ERROR,
    title="this pipeline computes wrong gradients without saying so",
    cause="two stages with virtual stages exchange two messages with the same peer in one batch, which are "
    "mixed up unless they overlap (measured: gradient norm 1,645 in place of 3)",
    fix="leave --num-layers-per-virtual-pipeline-stage out, or use four stages",
)
def pipeline_mixed_up(subject: Subject) -> Iterator[Found]:
    yield from _problems(subject, "LAY7")


@rule(
    "LAY8",
    Severity.WARNING,
    title="tensor parallelism crosses nodes",
    cause="every layer exchanges activations within the tensor-parallel group; between nodes that is ten "
    "times slower than within one",
    fix="keep --tensor-model-parallel-size within one node and use pipeline stages across nodes",
)
def tensor_parallel_across_nodes(subject: Subject) -> Iterator[Found]:
    layout, per_node = plan_layout(subject.config), subject.config.cluster.actor_num_gpus_per_node
    if subject.on_gpus and subject.config.training.backend == "megatron" and layout.tp > per_node:
        yield Found(f"TP {layout.tp} on nodes of {per_node} GPUs", "parallel.tensor_model_parallel_size")


@rule(
    "LAY9",
    Severity.ERROR,
    title="the padded vocabulary does not fit",
    cause="the embedding is cut into equal rows over tensor-parallel ranks and must hold every token",
    fix="leave --padded-vocab-size out; the plan takes the least that divides",
)
def vocabulary_not_divided(subject: Subject) -> Iterator[Found]:
    padded, spec = subject.config.model.padded_vocab_size, subject.spec
    tp = subject.config.parallel.tensor_model_parallel_size
    if padded is not None and spec is not None and (padded % tp or padded < spec.vocab_size):
        yield Found(f"{padded} rows for {spec.vocab_size} tokens over TP {tp}", "model.padded_vocab_size")


@rule(
    "LAY10",
    Severity.ERROR,
    title="this attention does not share sequences",
    cause="of Transformer Engine's kernels only the flash and the fused one pass keys and values on to the "
    "other context-parallel ranks, and only those of layers without windows; an indexer chooses among all "
    "keys of a sequence",
    fix="use --attention-backend flash, fused or auto, or --context-parallel-size 1",
)
def context_parallel_unfused(subject: Subject) -> Iterator[Found]:
    size, backend = subject.config.parallel.context_parallel_size, subject.config.training.attention_backend
    if size > 1 and backend in ("unfused", "local"):
        yield Found(f"CP {size} with attention_backend {backend}", "training.attention_backend")
    setting, fix = "parallel.context_parallel_size", "use --context-parallel-size 1"
    windowed = subject.spec is not None and any(x.attention.window is not None for x in subject.spec.layers)
    if size > 1 and windowed and _in_transformer_engine(subject):
        yield Found(f"CP {size} with windows in Transformer Engine's layers", setting, fix)
    if size > 1 and subject.spec is not None and subject.spec.has_indexer:
        yield Found(f"CP {size} with an indexer", setting, fix)


@rule(
    "LAY11",
    Severity.ERROR,
    title="DeepEP needs the flex dispatcher",
    cause="it replaces the exchange of tokens between expert-parallel ranks, which the other dispatchers do "
    "themselves",
    fix="add --moe-token-dispatcher-type flex",
)
def deepep_without_flex(subject: Subject) -> Iterator[Found]:
    training = subject.config.training
    if training.moe_enable_deepep and training.moe_token_dispatcher_type != "flex":
        yield Found(
            f"moe_enable_deepep with the {training.moe_token_dispatcher_type} dispatcher",
            "training.moe_enable_deepep",
        )


@rule(
    "LAY12",
    Severity.ERROR,
    title="this dispatcher needs sequences of one length",
    cause="pipeline stages exchange responses of many lengths; the allgather dispatcher cannot take them",
    fix="use --moe-token-dispatcher-type alltoall",
)
def allgather_in_pipeline(subject: Subject) -> Iterator[Found]:
    if (
        subject.config.training.moe_token_dispatcher_type == "allgather"
        and subject.config.parallel.pipeline_model_parallel_size > 1
    ):
        yield Found("the allgather dispatcher in a pipeline", "training.moe_token_dispatcher_type")


@rule(
    "LAY14",
    Severity.ERROR,
    title="the Megatron trainer does not carry this model",
    cause="only families whose logits were compared with megatron-core's are mapped to it",
    fix="use --train-backend native",
)
def not_carried(subject: Subject) -> Iterator[Found]:
    if subject.config.training.backend != "megatron" or subject.spec is None:
        return
    used = with_mtp(subject.spec, mtp_layers(subject.config, subject.spec.mtp_num_layers))
    obstacle = megatron_obstacle(used, _in_transformer_engine(subject))
    if obstacle:
        other_layers = "" if megatron_obstacle(used) else "use --transformer-impl local"
        yield Found(obstacle, "training.backend", other_layers)


@rule(
    "LAY13",
    Severity.ERROR,
    title="the samples of a step do not divide over the ranks",
    cause="every data-parallel rank gets the same number of samples of an optimizer step (in whole "
    "micro-batches)",
    fix="make --global-batch-size a multiple of the data-parallel size",
)
def step_not_divided(subject: Subject) -> Iterator[Found]:
    scale, request = subject.scale, subject.scale_request
    if scale is None or request is None or scale.problems or subject.config.training.backend != "megatron":
        return
    layout, unit = scale.layout, request.micro_batch_size
    if not request.splits_steps(layout):
        share = layout.dp * unit
        below, rest = divmod(request.samples_per_step, share)
        near = share * (below + (rest * 2 >= share or below == 0))
        micro = f" x micro-batches of {unit}" if unit > 1 else ""
        yield Found(
            f"{request.samples_per_step} samples over DP {layout.dp}{micro}",
            "training.global_batch_size",
            f"use {near} samples per step, or {nearest_fix(subject)}",
        )
