"""FP8 in blocks: e4m3 values with one scale for every 128x128 weights, or for 128 activations of a token.

The convention of the published checkpoints (`weight`, `weight_scale_inv`): weight = value * scale.
Legend: M rows, N columns, B = 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from miles.arch.precision import ScaleFormat
from miles.precision.blocks import Block, block_peaks, check_finite, over_scales, times_scales
from miles.precision.elements import E4M3_MAX, power_of_two_above, to_e4m3
from miles.precision.straight_through import straight_through

WEIGHTS: Block = (128, 128)
ACTIVATIONS: Block = (1, 128)
SMALLEST_PEAK = 1e-10
"""Blocks of smaller weights than this share its scale, so that a block of zeros has one."""


@dataclass(frozen=True)
class BlockFp8:
    """values float8_e4m3fn [M, N]; scales fp32 [ceil(M / rows), ceil(N / columns)] of `block`."""

    values: Tensor
    scales: Tensor
    block: Block = WEIGHTS


def quantise(weight: Tensor, scale_format: ScaleFormat = "fp32", block: Block = WEIGHTS) -> BlockFp8:
    """Round a matrix [M, N] of any float dtype; a block at the edge may be smaller.

    scale = max(max|block|, 1e-10) / 448, value = weight / scale (https://arxiv.org/abs/2412.19437, section
    3.3); `pow2` takes the next power of two above as the scale, exact under UE8M0. A block with an infinity
    or a NaN has the scale NaN.
    """
    scales = block_peaks(weight, block).clamp_min_(SMALLEST_PEAK) / E4M3_MAX
    if scale_format == "pow2":
        scales = power_of_two_above(scales)
    return BlockFp8(over_scales(weight, scales, block, to_e4m3, torch.float8_e4m3fn), scales, block)


def dequantise(stored: BlockFp8, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights that the stored form stands for, [M, N]; products are made in fp32 and rounded once."""
    return times_scales(stored.values, stored.scales, stored.block, dtype)


def fake_quantise(numbers: Tensor, scale_format: ScaleFormat = "fp32", block: Block = WEIGHTS) -> Tensor:
    """The rounded numbers in the dtype of `numbers`, with the gradient of the identity.

    numbers: [M, N] with the blocks of weights, [..., N] with those of activations.
    """
    return straight_through(numbers, lambda matrix: dequantise(quantise(matrix, scale_format, block)))


def published(name: str, stored: BlockFp8) -> dict[str, Tensor]:
    """The tensors of a checkpoint (DeepSeek-V3's layout), for a weight called `name` (`….weight`).

    Raises MilesError for weights that are not finite.
    """
    check_finite(stored.scales, name)
    return {name: stored.values, f"{name}_scale_inv": stored.scales}


def from_published(name: str, tensors: dict[str, Tensor]) -> BlockFp8:
    """The stored form out of a checkpoint's tensors; scales may be fp32 or bf16."""
    return BlockFp8(tensors[name], tensors[f"{name}_scale_inv"].float())
