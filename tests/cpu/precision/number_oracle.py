"""The published definitions, one number at a time, without torch.

The encodings are decoded from their bits; rounding looks for the nearest of all encoded values and takes the
even code of two that are equally near. Scales follow the formats' formulas in IEEE fp32 (numpy scalars).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

f32 = np.float32
Matrix = np.ndarray[Any, np.dtype[np.float32]]


def decoded(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """A positive code as sign-less floating-point bits, subnormals included."""
    exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    fraction = mantissa / (1 << mantissa_bits)
    return fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)


E4M3 = [decoded(code, 4, 3, 7) for code in range(0x7F)]
"""Up to 448; code 0x7F is NaN."""
E2M1 = [decoded(code, 2, 1, 1) for code in range(8)]


def nearest(number: float, values: list[float]) -> int:
    """Code of the nearest value to |number|, ties to even, the last code beyond the range."""
    size = abs(float(number))
    above = bisect_left(values, size)
    if above == len(values):
        return above - 1
    if above == 0:
        return 0
    low, high = (abs(Fraction(size) - Fraction(values[code])) for code in (above - 1, above))
    if low == high:
        return above if above % 2 == 0 else above - 1
    return above if high < low else above - 1


def coded(number: float, values: list[float], sign_bit: int) -> int:
    return nearest(number, values) | (sign_bit if np.signbit(number) else 0)


def integer(number: float, low: int, high: int) -> int:
    """Halves to even, saturated."""
    return min(max(round(Fraction(float(number))), low), high)


def least_power(scale: float) -> int:
    """The least k with 2^k >= scale, within -127 .. 127."""
    k = -127
    while Fraction(2) ** k < Fraction(float(scale)) and k < 127:
        k += 1
    return k


def greatest_power(number: float) -> int:
    """The greatest k with 2^k <= number, at least -149."""
    k = -149
    while Fraction(2) ** (k + 1) <= Fraction(float(number)):
        k += 1
    return k


def by_blocks(
    matrix: Matrix,
    block: tuple[int, int],
    scale_of: Callable[[float], Any],
    code_of: Callable[[Any], int],
) -> tuple[np.ndarray, np.ndarray]:
    """Codes [M, N] and fp32 scales [Mb, Nb], with value = number / scale in fp32."""
    rows, columns = matrix.shape
    high, wide = block
    codes = np.zeros(matrix.shape, np.int64)
    scales = np.zeros((-(-rows // high), -(-columns // wide)), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            cut = (slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide))
            peak = max(abs(number) for number in matrix[cut].flat)
            scale = scales[i, j] = f32(scale_of(peak))
            codes[cut] = [[code_of(f32(number / scale)) for number in row] for row in matrix[cut]]
    return codes, scales


def e4m3(number: Any) -> int:
    return coded(number, E4M3, 0x80)


def e2m1(number: Any) -> int:
    return coded(number, E2M1, 0x8)


def fp8_block(matrix: Matrix, block: tuple[int, int], pow2: bool, smallest: float = 1e-10) -> Any:
    """max(|x|, smallest) / 448, or the next power of two."""

    def scale_of(peak: Any) -> Any:
        scale = f32(max(peak, f32(smallest)) / f32(448))
        return f32(2.0 ** least_power(scale)) if pow2 else scale

    return by_blocks(matrix, block, scale_of, e4m3)


def mxfp8(matrix: Matrix, floor: bool) -> Any:
    """OCP MX 1.0, section 6.3 (`floor`), or the least power of two over max / 448."""

    def scale_of(peak: Any) -> Any:
        if floor:
            return f32(2.0 ** max(greatest_power(peak) - 8, -127)) if peak else f32(2.0**-127)
        return f32(2.0 ** least_power(f32(peak / f32(448))))

    return by_blocks(matrix, (1, 32), scale_of, e4m3)


def nvfp4(matrix: Matrix) -> Any:
    """Codes, decoded block scales and the outer scale max / (6 * 448)."""
    outer = f32(max(np.abs(matrix).max(), f32(1e-10)) / f32(6 * 448))
    stored = []

    def scale_of(peak: Any) -> Any:
        wanted = max(f32(f32(peak / f32(6)) / outer), f32(2.0**-9))
        stored.append(E4M3[nearest(wanted, E4M3)])
        return f32(f32(stored[-1]) * outer)

    codes, _ = by_blocks(matrix, (1, 16), scale_of, e2m1)
    return codes, np.array(stored, np.float32).reshape(len(matrix), -1), outer


def int4(matrix: Matrix, group: int) -> Any:
    """max(max / 7, 1e-5), values -7 .. 7."""
    return by_blocks(
        matrix, (1, group), lambda peak: max(f32(peak / f32(7)), f32(1e-5)), lambda n: integer(n, -7, 7)
    )


def int4_asymmetric(matrix: Matrix, group: int) -> Any:
    """Values and zeros 0 .. 15 and scales: (high - low) / 15 over a range that holds 0."""
    rows, columns = matrix.shape
    values, shape = np.zeros(matrix.shape, np.int64), (rows, columns // group)
    scales, zeros = np.zeros(shape, np.float32), np.zeros(shape, np.int64)
    for i in range(rows):
        for j in range(shape[1]):
            numbers = matrix[i, j * group : (j + 1) * group]
            low, high = min(numbers.min(), f32(0)), max(numbers.max(), f32(0))
            scale = scales[i, j] = max(f32(f32(high - low) / f32(15)), f32(1e-5))
            zero = zeros[i, j] = integer(f32(-low / scale), 0, 15)
            values[i, j * group : (j + 1) * group] = [
                min(max(round(Fraction(float(f32(n / scale)))) + zero, 0), 15) for n in numbers
            ]
    return values, zeros, scales


def int8(matrix: Matrix) -> Any:
    """max(max, 1e-12) / 127, values -127 .. 127, a scale for each row."""
    return by_blocks(
        matrix,
        (1, matrix.shape[1]),
        lambda peak: f32(max(peak, f32(1e-12)) / f32(127)),
        lambda n: integer(n, -127, 127),
    )
