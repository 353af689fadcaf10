"""Rules on number formats: trainer, engine, checkpoint and hardware agree, or the difference is said."""

from __future__ import annotations

from collections.abc import Iterator

from miles.planning.findings import Found, Severity
from miles.planning.formats import QUANTISED
from miles.planning.precision import fp8_scales
from miles.planning.precision import training_format as planned_training_format
from miles.planning.rules.placement import engine_expert_parallel
from miles.planning.rules.rule import rule
from miles.planning.subject import Subject

FP8_BLOCK = 128

ALLOWED = {
    "fp8": ("plain", "fp8"),
    "mxfp8": ("plain", "mxfp8"),
    "nvfp4": ("nvfp4",),
    "int4": ("int4",),
    "plain": ("plain",),
}
"""Training formats that each rollout format goes with (miles' docs/advanced/low-precision.md)."""


def training_format(subject: Subject) -> str:
    """Format of the trainer's matrix products: `plain` for fp32, bf16 and fp16; `fp8` for its block,
    tensor and delayed recipes.
    """
    trained = planned_training_format(subject.config)
    return {None: "plain", "fp8_tensor": "fp8"}.get(trained, trained or "plain")


def engine_format(subject: Subject) -> str:
    """Format of the engine's matrix products, on the same scale."""
    return subject.rollout_format if subject.rollout_format in QUANTISED else "plain"


@rule(
    "FP1",
    Severity.ERROR,
    title="FP8 block scales of another convention than the hardware's",
    cause="Hopper's kernels take FP32 scales; on Blackwell block FP8 is run as MXFP8, whose scales are "
    "powers of two. With the other convention quality is lost silently, or a kernel fails on the shape of "
    "the scales",
    fix="leave --fp8-block-scale out; the plan chooses by hardware",
)
def scales_of_other_hardware(subject: Subject) -> Iterator[Found]:
    precision, hardware = subject.config.precision, subject.hardware
    quantisation = subject.facts.checkpoint.quantisation
    chosen = precision.fp8_block_scale
    if chosen is None or hardware.kind is None or (quantisation and quantisation.scales == chosen):
        return
    usual = "pow2" if hardware.generation == "sm100" else "fp32"
    if chosen != usual:
        yield Found(
            f"fp8_block_scale {chosen}, {hardware.kind.name} takes {usual}", "precision.fp8_block_scale"
        )


@rule(
    "FP6",
    Severity.ERROR,
    title="weights are quantised that must not be",
    cause="embedding, head, norms and routers decide too much to be rounded; a converter with a wrong "
    "ignore list leaves a router whose outputs are all zero",
    fix="convert again with miles convert, which leaves embed_tokens, lm_head, norms and mlp.gate plain",
)
def wrongly_quantised(subject: Subject) -> Iterator[Found]:
    quantisation = subject.facts.checkpoint.quantisation
    names = quantisation.wrongly_quantised if quantisation else ()
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield Found(f"{names[0]}{more}", "model.hf_checkpoint")


@rule(
    "FP7",
    Severity.ERROR,
    title="converter and trainer disagree about the layers in high precision",
    cause="a layer that is quantised on one side only computes another function in rollout than in training",
    fix="convert with the same exceptions (miles convert BASE DIR --for RUN), or change them in the run file",
)
def exceptions_disagree(subject: Subject) -> Iterator[Found]:
    precision, spec = subject.config.precision, subject.spec
    quantisation = subject.facts.checkpoint.quantisation
    start, end = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
    megatron = subject.config.training.backend == "megatron"
    if megatron and (start or end) and precision.fp8_format and not precision.first_last_layers_bf16:
        yield Found(
            f"{start} first and {end} last layers in bf16, but first_last_layers_bf16 is off: the trainer "
            "ignores them",
            "precision.num_layers_at_start_in_bf16" if start else "precision.num_layers_at_end_in_bf16",
            "add --first-last-layers-bf16",
        )
    if spec is None or quantisation is None or not quantisation.low_precision_layers:
        return
    kept = {*range(start), *range(spec.num_layers - end, spec.num_layers)}
    stored = set(range(spec.num_layers)) - quantisation.low_precision_layers
    if engine_format(subject) == "plain" or kept == stored:
        return
    quantised = sorted(kept & quantisation.low_precision_layers)
    plain = sorted(stored - kept)
    told = [
        f"layers {_span(quantised)} are quantised in the checkpoint and kept in bf16 by the run file"
    ] * bool(quantised)
    told += [f"layers {_span(plain)} are plain in the checkpoint and quantised by the run file"] * bool(plain)
    yield Found("; ".join(told), "precision.num_layers_at_start_in_bf16")


def _span(layers: list[int]) -> str:
    shown = ", ".join(map(str, layers[:6]))
    return f"{shown}, …" if len(layers) > 6 else shown


@rule(
    "I41",
    Severity.ERROR,
    title="INT4 on one side only",
    cause="with QAT alone the engine samples from weights that were never rounded, with INT4 rollout alone "
    "the trainer does not know the rounding; both are worse than neither, and the gap grows",
    fix="use --int4-qat together with --rollout-format int4, or neither",
)
def int4_one_sided(subject: Subject) -> Iterator[Found]:
    trained, sampled = training_format(subject) == "int4", engine_format(subject) == "int4"
    if trained != sampled:
        side = "training" if trained else "rollout"
        setting = "precision.int4_qat" if trained else "precision.rollout_format"
        yield Found(f"{side} is INT4, the other side {'rollout' if trained else 'training'} is not", setting)


@rule(
    "I42",
    Severity.ERROR,
    title="INT4 group sizes differ",
    cause="trainer and packed checkpoint must round the same weights together, or fake-quantised training "
    "learns other weights than the engine samples with",
    fix="set --int4-group-size to the checkpoint's",
)
def group_sizes_differ(subject: Subject) -> Iterator[Found]:
    quantisation, precision = subject.facts.checkpoint.quantisation, subject.config.precision
    held = quantisation.group_size if quantisation and quantisation.method == "int4" else None
    if held is not None and held != precision.int4_group_size and "int4" in (
        training_format(subject), engine_format(subject)
    ):  # fmt: skip
        yield Found(
            f"int4_group_size {precision.int4_group_size}, the checkpoint has groups of {held}",
            "precision.int4_group_size",
            f"set --int4-group-size {held}",
        )


@rule(
    "NV1",
    Severity.ERROR,
    title="trainer and engine cut NVFP4 experts differently",
    cause="the outer scale of NVFP4 belongs to a whole token and expert: cut over a different number of "
    "ranks, it is another scale",
    fix="make --expert-tensor-parallel-size equal to the engine's GPUs over its expert-parallel size",
)
def nvfp4_cut_differs(subject: Subject) -> Iterator[Found]:
    if training_format(subject) != "nvfp4" or engine_format(subject) != "nvfp4" or subject.scale is None:
        return
    trainer = subject.scale.layout.etp
    engine = subject.config.cluster.rollout_num_gpus_per_engine // engine_expert_parallel(subject)
    if trainer != engine:
        yield Found(
            f"ETP {trainer} in training, {engine} in the engine", "parallel.expert_tensor_parallel_size"
        )


@rule(
    "PRC1",
    Severity.ERROR,
    title="rollout and training formats do not go together",
    cause="the engine must not be more exact than the trainer, and not of another low-precision family: "
    "their difference is what the policy gradient cannot see",
    fix="use one format on both sides, or bf16 training with an fp8 engine",
)
def formats_do_not_pair(subject: Subject) -> Iterator[Found]:
    trained, sampled = training_format(subject), engine_format(subject)
    if trained not in ALLOWED[sampled] and "int4" not in (trained, sampled):
        shown = {"plain": subject.dtype or "bf16"}
        yield Found(
            f"{shown.get(sampled, sampled)} rollout with {shown.get(trained, trained)} training",
            "precision.rollout_format",
        )


@rule(
    "PRC2",
    Severity.WARNING,
    title="the engine is less exact than the trainer",
    cause="mixed precision adds a constant offset between the probabilities of both sides (0.03 to 0.27 in "
    "mean absolute difference was seen), which grows with the size of the model",
    fix="train in the same format (--fp8-format e4m3 --fp8-recipe blockwise), or correct for it: --use-tis",
)
def mixed_precision(subject: Subject) -> Iterator[Found]:
    trained, sampled = training_format(subject), engine_format(subject)
    if sampled in ("fp8", "mxfp8") and trained == "plain" and not subject.config.correction.use_tis:
        yield Found(
            f"{sampled} rollout with {subject.dtype} training and no correction", "precision.rollout_format"
        )


@rule(
    "PRC3",
    Severity.ERROR,
    title="the checkpoint is in another format than the run",
    cause="an engine starts from the checkpoint's quantised tensors; rounding them again to another format "
    "adds the errors of both",
    fix="start from the checkpoint in bf16, or leave --rollout-format out",
)
def checkpoint_format_differs(subject: Subject) -> Iterator[Found]:
    quantisation, wanted = subject.facts.checkpoint.quantisation, subject.config.precision.rollout_format
    if quantisation is not None and wanted in QUANTISED and quantisation.method not in (None, wanted):
        yield Found(f"rollout_format {wanted}, the checkpoint is {quantisation}", "precision.rollout_format")


@rule(
    "PRC5",
    Severity.ERROR,
    title="FP8 blocks of another size",
    cause="the blockwise recipe rounds 128x128 weights together; a checkpoint with other blocks is rounded "
    "differently",
    fix="convert with 128x128 blocks: miles convert BASE DIR --to fp8",
)
def block_sizes_differ(subject: Subject) -> Iterator[Found]:
    quantisation = subject.facts.checkpoint.quantisation
    if (
        quantisation is not None
        and quantisation.method == "fp8"
        and quantisation.block_size not in ((), (FP8_BLOCK, FP8_BLOCK))
        and subject.config.precision.fp8_recipe == "blockwise"
    ):
        yield Found(f"the checkpoint has {quantisation}", "precision.fp8_recipe")


@rule(
    "PRC6",
    Severity.ERROR,
    title="FP8 without Transformer Engine",
    cause="all FP8 layers are Transformer Engine's: without it Megatron trains a dense model in bf16 "
    "without saying so, and fails on an MoE model",
    fix="use --transformer-impl transformer_engine",
)
def fp8_without_te(subject: Subject) -> Iterator[Found]:
    config = subject.config
    if (
        config.precision.fp8_format or config.precision.fp4_format
    ) and config.training.transformer_impl == "local":
        yield Found("low-precision training with transformer_impl local", "training.transformer_impl")


@rule(
    "PRC7",
    Severity.ERROR,
    title="FP8 parameters with an optimizer on the host",
    cause="fp8_param_gather keeps no bf16 copy of the weights, which the host's optimizer would update",
    fix="leave --fp8-param-gather or --optimizer-cpu-offload out",
)
def fp8_params_on_host(subject: Subject) -> Iterator[Found]:
    if subject.config.precision.fp8_param_gather and subject.config.optimizer.optimizer_cpu_offload:
        yield Found("fp8_param_gather with optimizer_cpu_offload", "precision.fp8_param_gather")


@rule(
    "PRC8",
    Severity.ERROR,
    title="the engine cuts weights that share a scale",
    cause="the kernels need whole 128-column blocks of every expert and MLP on each GPU of an engine, and "
    "whole INT4 groups of every expert",
    fix="spread experts instead of cutting them: --sglang-expert-parallel-size, or use smaller engines",
)
def engine_cuts_blocks(subject: Subject) -> Iterator[Found]:
    spec, engine = subject.spec, subject.config.cluster.rollout_num_gpus_per_engine
    widths = {"fp8": FP8_BLOCK, "int4": subject.config.precision.int4_group_size}
    block = widths.get(engine_format(subject))
    if spec is None or not subject.on_gpus or block is None:
        return
    experts = engine_expert_parallel(subject)
    ranks = max(engine // experts, 1) if spec.is_moe else engine
    mlp = spec.layers[-1].mlp
    if mlp.intermediate_size % (ranks * block):
        fix = f"add --sglang-expert-parallel-size {engine}" if spec.is_moe else ""
        yield Found(
            f"a width of {mlp.intermediate_size} over {ranks} GPUs is {mlp.intermediate_size / ranks:g} "
            f"columns, not a multiple of {block}",
            "cluster.rollout_num_gpus_per_engine",
            fix,
        )


@rule(
    "PRC9",
    Severity.ERROR,
    title="this FP8 recipe has no exceptions in bf16",
    cause="delayed scaling keeps one history for all layers, so first and last layers cannot stay in bf16",
    fix="use --fp8-recipe blockwise",
)
def delayed_with_exceptions(subject: Subject) -> Iterator[Found]:
    precision = subject.config.precision
    if precision.fp8_recipe == "delayed" and precision.first_last_layers_bf16:
        yield Found("first_last_layers_bf16 with fp8_recipe delayed", "precision.fp8_recipe")


@rule(
    "ENV2",
    Severity.ERROR,
    title="the shell and the plan disagree about FP8 scales",
    cause="trainer and exporter read NVTE_FP8_BLOCK_SCALING_FP32_SCALES (1: FP32, 0: powers of two); with "
    "another convention than the plan's the two sides quantise differently",
    fix="unset NVTE_FP8_BLOCK_SCALING_FP32_SCALES; the run exports what it needs",
    local=True,
)
def scales_contradict(subject: Subject) -> Iterator[Found]:
    shell, precision = (
        subject.facts.machine.variable("NVTE_FP8_BLOCK_SCALING_FP32_SCALES"),
        subject.config.precision,
    )
    decided = precision.fp8_block_scale is not None or (
        precision.fp8_recipe == "blockwise" and subject.hardware.kind is not None
    )
    wanted = fp8_scales(subject.config, subject.hardware)
    if shell is not None and decided and shell != {"fp32": "1", "pow2": "0"}[wanted]:
        yield Found(
            f"NVTE_FP8_BLOCK_SCALING_FP32_SCALES={shell}, the plan takes {wanted} scales",
            "precision.fp8_block_scale",
        )
