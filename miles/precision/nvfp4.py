"""NVFP4: e2m1 values, 16 in a row share an e4m3 scale, the matrix shares an fp32 outer scale.

weight = value * block scale * outer scale (https://arxiv.org/abs/2509.25149, appendix C). The layout is
ModelOpt's: `weight` (two codes in a byte, the first in the low half), `weight_scale`, `weight_scale_2`.
Legend: M rows, N columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from miles.precision.blocks import Block, block_peaks, check_finite, check_groups, over_scales, times_scales
from miles.precision.elements import E2M1_MAX, E4M3_MAX, from_e2m1, to_e2m1, to_e4m3
from miles.precision.straight_through import straight_through

GROUP = 16
ROW: Block = (1, GROUP)
SMALLEST_PEAK = 1e-10
SMALLEST_SCALE = 2.0**-9
"""The least positive e4m3: groups of zeros have it, so that no scale is 0."""


@dataclass(frozen=True)
class Nvfp4:
    """codes uint8 [M, N], one a byte; scales float8_e4m3fn [M, N / 16]; outer fp32 []."""

    codes: Tensor
    scales: Tensor
    outer: Tensor


def outer_scale(*weights: Tensor) -> Tensor:
    """The scale that uses the whole range of block scales, fp32 []: max|x| / (6 * 448).

    Matrices that a kernel multiplies as one (gate and up) share it: give all of them.
    """
    peaks = [block_peaks(weight, (1, weight.shape[1])).amax() for weight in weights]
    return torch.stack(peaks).amax().clamp_min(SMALLEST_PEAK) / (E2M1_MAX * E4M3_MAX)


def quantise(weight: Tensor, outer: Tensor | None = None) -> Nvfp4:
    """Round a matrix [M, N] of any float dtype; `outer` where it is shared with other matrices.

    A group with an infinity or a NaN has the scale NaN; without `outer` all groups have. Raises MilesError
    where groups do not fill a row.
    """
    check_groups(weight, GROUP, "NVFP4")
    outer = outer_scale(weight) if outer is None else outer
    wanted = block_peaks(weight, ROW) / E2M1_MAX / outer
    scales = to_e4m3(wanted.clamp_min_(SMALLEST_SCALE))
    codes = over_scales(weight, scales.float() * outer, ROW, to_e2m1, torch.uint8)
    return Nvfp4(codes, scales, outer)


def dequantise(stored: Nvfp4, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights that the stored form stands for, [M, N]; scales are multiplied first, in fp32."""
    return times_scales(stored.codes, stored.scales.float() * stored.outer, ROW, dtype, from_e2m1)


def fake_quantise(numbers: Tensor, outer: Tensor | None = None) -> Tensor:
    """The rounded numbers [..., N] in the dtype of `numbers`, with the gradient of the identity."""
    return straight_through(numbers, lambda matrix: dequantise(quantise(matrix, outer)))


def published(name: str, stored: Nvfp4) -> dict[str, Tensor]:
    """The tensors of a checkpoint, for a weight called `name`. Raises MilesError for weights not finite."""
    check_finite(stored.scales.float() * stored.outer, name)
    pairs = stored.codes.view(len(stored.codes), -1, 2)
    packed = pairs[..., 0] | (pairs[..., 1] << 4)
    return {name: packed, f"{name}_scale": stored.scales, f"{name}_scale_2": stored.outer}


def from_published(name: str, tensors: dict[str, Tensor]) -> Nvfp4:
    """The stored form out of a checkpoint's tensors."""
    packed = tensors[name]
    codes = torch.stack((packed & 15, packed >> 4), -1).view(len(packed), -1)
    return Nvfp4(codes, tensors[f"{name}_scale"], tensors[f"{name}_scale_2"].float())
