"""The precision policy of a run: what its settings, its checkpoint and its hardware say together."""

from __future__ import annotations

from miles.arch import ArchSpec, Dtype
from miles.arch.precision import FormatName, NumberFormat, PrecisionPolicy, ScaleFormat, precision_policy
from miles.config import RunConfig
from miles.planning.formats import Format
from miles.planning.hardware import Hardware


def training_format(config: RunConfig) -> FormatName | None:
    """Format of the trainer's matrix products; None for that of its weights."""
    precision = config.precision
    if precision.fp4_format:
        return "nvfp4"
    if precision.int4_qat:
        return "int4"
    if precision.fp8_format:
        return "mxfp8" if precision.fp8_recipe == "mxfp8" else _FP8_RECIPES[precision.fp8_recipe]
    return None


def plan_precision(
    config: RunConfig, spec: ArchSpec, hardware: Hardware, dtype: Dtype, rollout_format: Format
) -> PrecisionPolicy:
    """The policy that engines, weight sync, trainers and the converter read."""

    def number_format(name: FormatName) -> NumberFormat:
        return NumberFormat(
            name, fp8_scales(config, hardware) if name == "fp8" else "fp32", config.precision.int4_group_size
        )

    trained = training_format(config)
    return precision_policy(
        spec,
        dtype,
        rollout=number_format(rollout_format),
        training=number_format(trained) if trained else None,
        first_layers=config.precision.num_layers_at_start_in_bf16,
        last_layers=config.precision.num_layers_at_end_in_bf16,
        kept=config.precision.extra_high_precision_layers_hf,
    )


def fp8_scales(config: RunConfig, hardware: Hardware) -> ScaleFormat:
    """Convention of FP8 block scales: as set, else powers of two on Blackwell and FP32 before it."""
    chosen = config.precision.fp8_block_scale
    return chosen or ("pow2" if hardware.generation == "sm100" else "fp32")


_FP8_RECIPES: dict[str | None, FormatName] = {
    "blockwise": "fp8",
    "delayed": "fp8_tensor",
    "tensorwise": "fp8_tensor",
    None: "fp8_tensor",
}
"""Megatron's default recipe is delayed scaling, with one scale for a tensor."""
