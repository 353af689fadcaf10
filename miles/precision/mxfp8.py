"""MXFP8: e4m3 values, 32 in a row share a power of two, stored as its exponent (UE8M0).

OCP Microscaling Formats 1.0, section 6. The checkpoint's layout is `weight` and `weight_scale_inv` (uint8),
as SGLang's mxfp8 and transformers read it. Legend: M rows, N columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from miles.precision.blocks import Block, block_peaks, check_finite, check_groups, over_scales, times_scales
from miles.precision.elements import (
    E4M3_MAX,
    from_e8m0,
    power_of_two_above,
    power_of_two_below,
    to_e4m3,
    to_e8m0,
)
from miles.precision.straight_through import straight_through

GROUP = 32
ROW: Block = (1, GROUP)
E4M3_BINADE = 256.0
"""Largest power of two that e4m3 holds."""

Scaling = Literal["ceil", "floor"]
"""`ceil`: the least power of two from max|x| / 448 up, so that nothing saturates (Transformer Engine).
`floor`: the specification's own 2^(floor(log2 max|x|) - 8), under which quotients over 448 saturate."""


@dataclass(frozen=True)
class Mxfp8:
    """values float8_e4m3fn [M, N]; exponents uint8 [M, N / 32], scale = 2 ** (exponent - 127), 255 = NaN."""

    values: Tensor
    exponents: Tensor


def quantise(weight: Tensor, scaling: Scaling = "ceil") -> Mxfp8:
    """Round a matrix [M, N] of any float dtype.

    A group of zeros has the smallest scale, 2^-127; one with an infinity or a NaN has the scale NaN, as the
    specification wants it. Raises MilesError where groups do not fill a row.
    """
    check_groups(weight, GROUP, "MXFP8")
    peaks = block_peaks(weight, ROW)
    scales = power_of_two_above(peaks / E4M3_MAX) if scaling == "ceil" else _floor(peaks)
    values = over_scales(weight, scales, ROW, to_e4m3, torch.float8_e4m3fn)
    return Mxfp8(values, to_e8m0(scales))


def dequantise(stored: Mxfp8, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights that the stored form stands for, [M, N]; exact in fp32 but for its underflow."""
    return times_scales(stored.values, from_e8m0(stored.exponents), ROW, dtype)


def fake_quantise(numbers: Tensor, scaling: Scaling = "ceil") -> Tensor:
    """The rounded numbers [..., N] in the dtype of `numbers`, with the gradient of the identity."""
    return straight_through(numbers, lambda matrix: dequantise(quantise(matrix, scaling)))


def published(name: str, stored: Mxfp8) -> dict[str, Tensor]:
    """The tensors of a checkpoint, for a weight called `name`. Raises MilesError for weights not finite."""
    check_finite(from_e8m0(stored.exponents), name)
    return {name: stored.values, f"{name}_scale_inv": stored.exponents}


def from_published(name: str, tensors: dict[str, Tensor]) -> Mxfp8:
    """The stored form out of a checkpoint's tensors."""
    return Mxfp8(tensors[name], tensors[f"{name}_scale_inv"])


def _floor(peaks: Tensor) -> Tensor:
    """2^(floor(log2 peak) - 8): the division is exact, and what underflows is bounded by 2^-127."""
    return power_of_two_below(power_of_two_below(peaks) / E4M3_BINADE)
