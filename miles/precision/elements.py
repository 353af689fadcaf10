"""Single numbers in a few bits: e4m3, e2m1, e8m0 and small integers, out of fp32 already over its scale.

All round to nearest, ties to even, and saturate at the largest number. The encodings are those of the OCP
formats (https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

E4M3_MAX = 448.0
E2M1_MAX = 6.0
E8M0_BIAS = 127
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""By code; the fourth bit is the sign."""
E2M1_MIDDLES = tuple((low + high) / 2 for low, high in pairwise(E2M1_VALUES))


def to_e4m3(numbers: Tensor) -> Tensor:
    """fp32 -> float8_e4m3fn; NaN stays NaN. Changes its argument."""
    return numbers.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def to_integers(numbers: Tensor, low: int, high: int) -> Tensor:
    """fp32 -> integers low .. high as fp32; NaN, which integers lack, becomes 0 beside its NaN scale."""
    return numbers.round_().clamp_(low, high).masked_fill_(numbers.isnan(), 0)


def to_e2m1(numbers: Tensor) -> Tensor:
    """fp32 -> codes of e2m1, uint8 0 .. 15; NaN becomes a zero beside its NaN scale."""
    size = numbers.abs()
    codes = numbers.signbit().view(torch.uint8) * 8
    for code, middle in enumerate(E2M1_MIDDLES):
        # A tie goes to the even one of the codes on both sides.
        codes += size >= middle if code % 2 else size > middle
    return codes


def from_e2m1(codes: Tensor) -> Tensor:
    """uint8 codes -> fp32."""
    table = torch.tensor(E2M1_VALUES + tuple(-value for value in E2M1_VALUES), device=codes.device)
    return table[codes.int()]


def power_of_two_above(scales: Tensor) -> Tensor:
    """The next power of two that is not smaller, exactly; fp32 >= 0 or NaN. At most 2^127, at least 2^-127,
    which 0 becomes.
    """
    mantissa, exponent = torch.frexp(scales)
    return _power(exponent - (mantissa == 0.5).int(), scales)


def power_of_two_below(scales: Tensor) -> Tensor:
    """The last power of two that is not larger, with the same bounds."""
    return _power(torch.frexp(scales).exponent - 1, scales)


def to_e8m0(powers: Tensor) -> Tensor:
    """Powers of two (fp32) -> their biased exponents, uint8; NaN -> 255."""
    exponent = torch.frexp(powers).exponent - 1 + E8M0_BIAS
    return exponent.masked_fill(powers.isnan(), 255).to(torch.uint8)


def from_e8m0(exponents: Tensor) -> Tensor:
    """uint8 -> 2 ** (exponent - 127), fp32; 255 -> NaN."""
    return exponents.view(torch.float8_e8m0fnu).float()


def _power(exponent: Tensor, like: Tensor) -> Tensor:
    biased = exponent.add(E8M0_BIAS).clamp_(0, 2 * E8M0_BIAS)
    biased = biased.masked_fill_(like == 0, 0).masked_fill_(like.isnan(), 255)
    return from_e8m0(biased.to(torch.uint8))
