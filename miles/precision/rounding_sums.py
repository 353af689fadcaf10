"""What rounding does to numbers, as sums that add up over matrices, layers and ranks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from miles.arch.precision import NumberFormat
from miles.precision import fp8_block, mxfp8
from miles.precision.elements import E4M3_MAX
from miles.precision.fp8_block import BlockFp8
from miles.precision.int4_group import INT4_MAX, GroupInt4
from miles.precision.mxfp8 import Mxfp8
from miles.precision.weight_format import Stored, dequantised

NUMBERS, NONZERO, SATURATED, UNDERFLOWED, SQUARED_ERROR, SQUARED_NORM = range(6)
COUNT = 6

BEYOND = {"fp8": 464 / 448, "mxfp8": 464 / 448, "int4": 7.5 / 7}
"""Numbers over the largest one of the format that still round to it, half a step beyond; larger ones are cut
off there."""


def rounding_sums(target: NumberFormat, exact: Tensor, stored: Stored) -> Tensor:
    """Sums over a matrix and its stored form, fp64 [6] in the order of the constants above."""
    exact = exact.detach().float()
    rounded, size = dequantised(stored), exact.abs()
    nonzero = size > 0
    cut_off = size > _largest(stored) * BEYOND[target.name]
    error = (rounded - exact).double()
    return torch.stack(
        [
            torch.tensor(float(exact.numel()), dtype=torch.float64, device=exact.device),
            nonzero.sum().double(),
            cut_off.sum().double(),
            (nonzero & (rounded == 0)).sum().double(),
            error.square().sum(),
            exact.double().square().sum(),
        ]
    )


def activation_sums(target: NumberFormat, x: Tensor) -> Tensor:
    """The same of activations [..., N], which this format rounds."""
    matrix = x.detach().reshape(-1, x.shape[-1])
    if target.name == "fp8":
        return rounding_sums(target, matrix, fp8_block.quantise(matrix, target.scales, fp8_block.ACTIVATIONS))
    assert target.name == "mxfp8", target
    return rounding_sums(target, matrix, mxfp8.quantise(matrix))


def shares(sums: Tensor) -> dict[str, float]:
    """Relative error (root of summed squares), and the fractions of numbers cut off at the format's largest
    and of non-zero ones that became 0. Absent where there is nothing to divide by.
    """
    values = sums.tolist()
    found = {}
    if values[SQUARED_NORM] != 0:
        found["error"] = (values[SQUARED_ERROR] / values[SQUARED_NORM]) ** 0.5
    if values[NUMBERS]:
        found["saturated_frac"] = values[SATURATED] / values[NUMBERS]
    if values[NONZERO]:
        found["underflow_frac"] = values[UNDERFLOWED] / values[NONZERO]
    return found


def _largest(stored: Stored) -> Tensor:
    """The largest number of the format beside each of the scales, [M, N]."""
    if isinstance(stored, GroupInt4):
        return dequantised(replace(stored, values=torch.full_like(stored.values, INT4_MAX)))
    assert isinstance(stored, BlockFp8 | Mxfp8)
    full = torch.full(stored.values.shape, E4M3_MAX, device=stored.values.device)
    return dequantised(replace(stored, values=full.to(torch.float8_e4m3fn)))
