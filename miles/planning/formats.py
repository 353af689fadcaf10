"""Number formats: what a stored weight takes with its share of the scales, in bytes."""

from __future__ import annotations

from typing import Literal, get_args

Format = Literal["fp32", "bf16", "fp16", "fp8", "mxfp8", "nvfp4", "int4"]
FORMATS: tuple[Format, ...] = get_args(Format)

QUANTISED: tuple[Format, ...] = ("fp8", "mxfp8", "nvfp4", "int4")
EXPERTS_ONLY: tuple[Format, ...] = ("nvfp4", "int4")
"""Formats that quantise the routed experts of an MoE model and leave its other weights alone."""

PLAIN_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a weight that carries no scale."""


def bytes_per_weight(weight_format: Format, int4_group_size: int = 32) -> float:
    """Bytes of one quantised weight and its share of the scales.

    fp8: an FP32 scale per 128x128 block. mxfp8: one byte per 32. nvfp4: one per 16. int4: two per group.
    """
    shared = {
        "fp8": 1 + 4 / (128 * 128),
        "mxfp8": 1 + 1 / 32,
        "nvfp4": 0.5 + 1 / 16,
        "int4": 0.5 + 2 / int4_group_size,
    }
    return shared[weight_format] if weight_format in shared else PLAIN_BYTES[weight_format]
