"""FP8 with one scale for each output channel, or one for the whole matrix: weight = value * scale.

The layout of compressed-tensors' `float-quantized` (`weight`, `weight_scale`). Legend: M rows (output
channels), N columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from miles.precision.blocks import block_peaks, check_finite, over_scales, times_scales
from miles.precision.elements import E4M3_MAX, to_e4m3
from miles.precision.straight_through import straight_through

Extent = Literal["channel", "tensor"]
"""What shares a scale; of activations, `channel` is a token."""

SMALLEST_PEAK = 1e-12
"""Smaller peaks share the scale of this one, so that zeros have one."""


@dataclass(frozen=True)
class ScaledFp8:
    """values float8_e4m3fn [M, N]; scales fp32 [M, 1] for `channel`, [1] for `tensor`."""

    values: Tensor
    scales: Tensor


def quantise(weight: Tensor, extent: Extent, scale: Tensor | None = None) -> ScaledFp8:
    """Round a matrix [M, N] of any float dtype: scale = max(max|x|, 1e-12) / 448.

    A channel (or matrix) with an infinity or a NaN has the scale NaN. `scale` [1]: of `tensor`, where these
    are some rows of it: see `tensor_scale`.
    """
    row = (1, weight.shape[1])
    if scale is not None:
        assert extent == "tensor"
        scales = scale
    elif extent == "tensor":
        scales = tensor_scale(weight)
    else:
        scales = _row_scales(weight)
    spread = scales.expand(len(weight), 1)
    return ScaledFp8(over_scales(weight, spread, row, to_e4m3, torch.float8_e4m3fn), scales)


def tensor_scale(*rows: Tensor) -> Tensor:
    """The scale of a matrix that comes in several strips of rows, fp32 [1]."""
    return torch.stack([_row_scales(strip).amax() for strip in rows]).amax().view(1)


def dequantise(stored: ScaledFp8, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights that the stored form stands for, [M, N]; products are made in fp32 and rounded once."""
    rows, columns = stored.values.shape
    return times_scales(stored.values, stored.scales.expand(rows, 1), (1, columns), dtype)


def fake_quantise(numbers: Tensor, extent: Extent) -> Tensor:
    """The rounded numbers [..., N] in the dtype of `numbers`, with the gradient of the identity."""
    return straight_through(numbers, lambda matrix: dequantise(quantise(matrix, extent)))


def published(name: str, stored: ScaledFp8) -> dict[str, Tensor]:
    """The tensors of a checkpoint, for a weight called `name`. Raises MilesError for weights not finite."""
    check_finite(stored.scales, name)
    return {name: stored.values, f"{name}_scale": stored.scales}


def from_published(name: str, tensors: dict[str, Tensor]) -> ScaledFp8:
    """The stored form out of a checkpoint's tensors."""
    return ScaledFp8(tensors[name], tensors[f"{name}_scale"].float())


def _row_scales(weight: Tensor) -> Tensor:
    return block_peaks(weight, (1, weight.shape[1])).clamp_min_(SMALLEST_PEAK) / E4M3_MAX
