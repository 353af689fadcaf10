"""`[precision]`: number formats, declared once for converter, trainer, engine and weight sync."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from miles.config.sections.base import Section, Strings


class PrecisionSection(Section):
    """How weights are stored and multiplied, in training and in rollout."""

    bf16: bool = False
    """Train in bfloat16 (Megatron's spelling of `dtype = "bf16"`)."""

    fp16: bool = False
    """Train in float16 with loss scaling (Megatron's spelling of `dtype = "fp16"`)."""

    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """FP8 training: e4m3 everywhere, or e5m2 for gradients; default: no FP8."""

    fp8_recipe: Literal["blockwise", "mxfp8", "delayed", "tensorwise"] | None = None
    """How FP8 scales are chosen; `blockwise`: 128x128 weights, 1x128 activations."""

    fp8_param_gather: bool = False
    """Gather parameters in FP8 and keep no bf16 copy."""

    fp8_block_scale: Literal["fp32", "pow2"] | None = None
    """Convention of block scales on both sides; default: by hardware, FP32 on Hopper, powers of two on
    Blackwell."""

    fp4_format: Literal["e2m1"] | None = None
    """FP4 training; default: no FP4."""

    fp4_recipe: Literal["nvfp4"] | None = None
    """How FP4 scales are chosen."""

    int4_qat: bool = False
    """Train with fake-quantised INT4 weights in the experts, for W4A16 rollout."""

    int4_group_size: PositiveInt = 32
    """Weights that share one INT4 scale, in training and in the packed rollout weights."""

    rollout_format: Literal["fp32", "bf16", "fp16", "fp8", "mxfp8", "nvfp4", "int4"] | None = None
    """Format of the engine's weights; default: that of the checkpoint."""

    num_layers_at_start_in_bf16: NonNegativeInt = 0
    """First layers kept in bf16."""

    num_layers_at_end_in_bf16: NonNegativeInt = 0
    """Last layers kept in bf16."""

    first_last_layers_bf16: bool = False
    """Honour the two counts above in the Megatron trainer (Megatron's own switch)."""

    extra_high_precision_layers_hf: Strings = ()
    """Published tensor names (or parts of them) kept in high precision everywhere."""

    te_precision_config_file: str | None = None
    """Transformer Engine's own per-layer precision file."""
