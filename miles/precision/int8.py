"""INT8 weights, symmetric, one scale for each output channel: weight = value * scale, value in -127 .. 127.

The layout of compressed-tensors' `int-quantized` (`weight`, `weight_scale`). Legend: M rows, N columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from miles.precision.blocks import block_peaks, check_finite, over_scales, times_scales
from miles.precision.elements import to_integers
from miles.precision.straight_through import straight_through

INT8_MAX = 127
SMALLEST_PEAK = 1e-12


@dataclass(frozen=True)
class ChannelInt8:
    """values int8 [M, N]; scales fp32 [M, 1]."""

    values: Tensor
    scales: Tensor


def quantise(weight: Tensor) -> ChannelInt8:
    """Round a matrix [M, N] of any float dtype: scale = max(max|row|, 1e-12) / 127, halves to even.

    A row with an infinity or a NaN has the scale NaN.
    """
    row = (1, weight.shape[1])
    scales = block_peaks(weight, row).clamp_min_(SMALLEST_PEAK) / INT8_MAX
    cast = partial(to_integers, low=-INT8_MAX, high=INT8_MAX)
    return ChannelInt8(over_scales(weight, scales, row, cast, torch.int8), scales)


def dequantise(stored: ChannelInt8, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights that the stored form stands for, [M, N]; products are made in fp32 and rounded once."""
    return times_scales(stored.values, stored.scales, (1, stored.values.shape[1]), dtype)


def fake_quantise(numbers: Tensor) -> Tensor:
    """The rounded numbers [..., N] in the dtype of `numbers`, with the gradient of the identity."""
    return straight_through(numbers, lambda matrix: dequantise(quantise(matrix)))


def published(name: str, stored: ChannelInt8) -> dict[str, Tensor]:
    """The tensors of a checkpoint, for a weight called `name`. Raises MilesError for weights not finite."""
    check_finite(stored.scales, name)
    return {name: stored.values, f"{name}_scale": stored.scales}


def from_published(name: str, tensors: dict[str, Tensor]) -> ChannelInt8:
    """The stored form out of a checkpoint's tensors."""
    return ChannelInt8(tensors[name], tensors[f"{name}_scale"].float())
