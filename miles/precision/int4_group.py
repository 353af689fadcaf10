"""INT4 weights in groups along the input dimension: weight = (value - zero) * scale.

Symmetric: values -7 .. 7, no zero. Asymmetric: 0 .. 15, with a zero in 0 .. 15. The layout is
compressed-tensors' `pack-quantized`. Legend: M rows, N columns, G weights per group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.errors import ConfigError, MilesError
from miles.precision.blocks import block_peaks, block_ranges, check_finite, over_scales, times_scales
from miles.precision.elements import to_integers
from miles.precision.straight_through import straight_through

INT4_MAX = 7
LEVELS = 15
OFFSET = 8
"""What is added to a value from -8 to 7 before it is packed."""
SMALLEST_SCALE = 1e-5


@dataclass(frozen=True)
class GroupInt4:
    """values int8 [M, N] in -8 .. 7, not packed; scales [M, N / G], fp32 or as stored; zeros int8 [M, N / G]
    in -8 .. 7 (asymmetric only; values and zeros both 8 lower than in the formula).
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    @property
    def group_size(self) -> int:
        return self.values.shape[1] // self.scales.shape[1]


def quantise(
    weight: Tensor, group_size: int, symmetric: bool = True, scale_dtype: torch.dtype = torch.float32
) -> GroupInt4:
    """Round a matrix [M, N] of any float dtype, halves to even.

    Symmetric: scale = max(max|group| / 7, 1e-5). Asymmetric: scale = max((high - low) / 15, 1e-5) over a
    range that is widened to hold 0, zero = round(-low / scale). Scales are rounded to `scale_dtype` before
    the values are, so that what a checkpoint stores is what was rounded with. A group with an infinity or a
    NaN has the scale NaN. Raises ConfigError where the groups do not fill a row.
    """
    _check_groups(weight, group_size)
    row = (1, group_size)
    if symmetric:
        scales = (block_peaks(weight, row) / INT4_MAX).clamp_min_(SMALLEST_SCALE).to(scale_dtype)
        cast = partial(to_integers, low=-INT4_MAX, high=INT4_MAX)
        return GroupInt4(over_scales(weight, scales, row, cast, torch.int8), scales)
    low, high = block_ranges(weight, row)
    low, high = low.clamp_max_(0), high.clamp_min_(0)
    scales = ((high - low) / LEVELS).clamp_min_(SMALLEST_SCALE).to(scale_dtype)
    zeros = to_integers(-low / scales.float(), 0, LEVELS) - OFFSET
    return GroupInt4(_asymmetric(weight, scales, zeros, group_size), scales, zeros.to(torch.int8))


def dequantise(stored: GroupInt4, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights that the stored form stands for, [M, N]; products are made in fp32 and rounded once."""
    row = (1, stored.group_size)
    if stored.zeros is None:
        return times_scales(stored.values, stored.scales, row, dtype)
    steps = stored.values.view(*stored.zeros.shape, -1) - stored.zeros[..., None]
    return times_scales(steps.view(stored.values.shape), stored.scales, row, dtype)


def fake_quantise(
    numbers: Tensor, group_size: int, symmetric: bool = True, scale_dtype: torch.dtype = torch.float32
) -> Tensor:
    """The rounded numbers [..., N] in the dtype of `numbers`, with the gradient of the identity."""
    return straight_through(
        numbers, lambda matrix: dequantise(quantise(matrix, group_size, symmetric, scale_dtype))
    )


def published(name: str, stored: GroupInt4) -> dict[str, Tensor]:
    """The tensors of a checkpoint, for a weight called `name`: eight values in an int32, the first in the
    lowest bits; zeros are packed along the rows. Raises MilesError for weights that are not finite.
    """
    check_finite(stored.scales, name)
    tensors = {
        f"{name}_packed": pack(stored.values),
        f"{name}_scale": stored.scales,
        f"{name}_shape": torch.tensor(stored.values.shape),
    }
    if stored.zeros is not None:
        tensors[f"{name}_zero_point"] = pack(stored.zeros.T).T.contiguous()
    return tensors


def from_published(name: str, tensors: dict[str, Tensor]) -> GroupInt4:
    """The stored form out of a checkpoint's tensors."""
    rows, columns = tensors[f"{name}_shape"].tolist()
    zeros = tensors.get(f"{name}_zero_point")
    return GroupInt4(
        unpack(tensors[f"{name}_packed"], columns),
        tensors[f"{name}_scale"],
        None if zeros is None else unpack(zeros.T, rows).T.contiguous(),
    )


def pack(values: Tensor) -> Tensor:
    """int8 [M, N] in -8 .. 7 -> int32 [M, ceil(N / 8)]; what is missing in the last word is 0 in its bits."""
    nibbles = F.pad((values + OFFSET).to(torch.uint8), (0, -values.shape[1] % 8))
    return (nibbles[:, ::2] | (nibbles[:, 1::2] << 4)).contiguous().view(torch.int32)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """int32 [M, ceil(N / 8)] -> int8 [M, N]."""
    halves = packed.contiguous().view(torch.uint8)
    nibbles = torch.stack((halves & 15, halves >> 4), -1).view(len(packed), -1)
    return (nibbles.to(torch.int8) - OFFSET)[:, :columns].contiguous()


def _asymmetric(weight: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    """int8 values -8 .. 7: round(w / scale) + zero, within the sixteen levels."""
    spread = [part.reshape(-1, 1) for part in (scales, zeros)]
    groups, row = weight.reshape(-1, group_size), (1, group_size)
    cast = partial(to_integers, low=-LEVELS, high=LEVELS)
    steps = over_scales(groups, spread[0], row, cast, torch.int8)
    return steps.add_(spread[1].to(torch.int8)).clamp_(-OFFSET, OFFSET - 1).view(weight.shape)


def _check_groups(weight: Tensor, group_size: int) -> None:
    columns = weight.shape[1]
    if columns % group_size:
        raise ConfigError(
            MilesError(
                f"rows of {columns} weights cannot be cut into INT4 groups of {group_size}",
                where="precision.int4_group_size",
                fix=f"choose a divisor of {columns}",
            )
        )
