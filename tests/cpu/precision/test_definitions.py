"""Every format equals its published definition bit for bit, on random numbers and on the nasty ones."""

from __future__ import annotations

from itertools import pairwise

import number_oracle as oracle
import numpy as np
import pytest
import torch
from torch import Tensor

from miles.precision import elements, fp8_block, fp8_scaled, int4_group, int8, mxfp8, nvfp4


def gaussian(rows: int, columns: int, seed: int = 0, spread: float = 0.05) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * spread


def wild(rows: int, columns: int) -> Tensor:
    """Magnitudes from 1e-42 to 1e37 in one matrix, most of a block under- or overflows."""
    generator = torch.Generator().manual_seed(1)
    exponents = torch.empty(rows, columns).uniform_(-42, 37, generator=generator)
    exponents[: rows // 2] = exponents[: rows // 2, :1] + exponents[: rows // 2] / 20
    return 10**exponents * gaussian(rows, columns, 2).sign()


def ties(rows: int, columns: int) -> Tensor:
    """Numbers half-way between encoded ones and their fp32 neighbours, under peaks that make scales exact."""
    halves = []
    for values, peak in ((oracle.E4M3, 448.0), (oracle.E2M1, 6.0), (list(map(float, range(8))), 7.0)):
        middle = torch.tensor([(a + b) / 2 for a, b in pairwise(values)])
        up, down = torch.nextafter(middle, torch.tensor(1e9)), torch.nextafter(middle, torch.tensor(0.0))
        halves += [torch.cat((middle, -up, down, -middle)), torch.tensor([peak])]
    row = torch.cat(halves).repeat(columns)[:columns]
    out = torch.stack([row.roll(7 * i) * 2.0 ** (i % 5 - 2) for i in range(rows)])
    out[:, ::16] = torch.tensor([448.0, 6.0, 7.0, 0.0, -448.0])[torch.arange(rows) % 5][:, None]
    return out


def edges(rows: int, columns: int) -> Tensor:
    """Zeros of both signs, subnormals, powers of two and their neighbours."""
    seeds = [0.0, -0.0, 1e-45, -1e-40, 2.0**-127, 2.0**-126, 448 * 2.0**-9, 1.0, -2.0, 3e38, 1e-10, 1e-5]
    base = torch.tensor(seeds)
    numbers = torch.cat((base, torch.nextafter(base, torch.tensor(1.0)), torch.nextafter(base, -base)))
    matrix = torch.zeros(rows, columns)
    for i in range(1, rows):
        matrix[i] = numbers[i % len(numbers)]
        matrix[i, 1::3] *= 0.37
    return matrix


CASES = {
    "gaussian": gaussian(7, 96),
    "wild": wild(24, 64),
    "ties": ties(10, 160),
    "edges": edges(37, 32),
    "bf16": gaussian(5, 64).bfloat16(),
}
every_case = pytest.mark.parametrize("matrix", CASES.values(), ids=CASES)


def numbers(matrix: Tensor) -> oracle.Matrix:
    return matrix.float().numpy()


def same(found: Tensor, expected: np.ndarray) -> None:
    """Equal as numbers, signs of zeros aside; codes are integers, so nothing is left out there."""
    np.testing.assert_array_equal(found.float().numpy(), np.asarray(expected, np.float32))


@every_case
@pytest.mark.parametrize("block", [(128, 128), (1, 128), (4, 48)])
@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
def test_block_fp8(matrix: Tensor, block: tuple[int, int], scale_format: fp8_block.ScaleFormat) -> None:
    stored = fp8_block.quantise(matrix, scale_format, block)
    codes, scales = oracle.fp8_block(numbers(matrix), block, scale_format == "pow2")
    same(stored.values.view(torch.uint8), codes)
    same(stored.scales, scales)


@every_case
def test_fp8_by_channel_and_by_tensor(matrix: Tensor) -> None:
    rows, columns = matrix.shape
    for extent, block in (("channel", (1, columns)), ("tensor", (rows, columns))):
        stored = fp8_scaled.quantise(matrix, extent)  # type: ignore[arg-type]
        codes, scales = oracle.fp8_block(numbers(matrix), block, pow2=False, smallest=1e-12)
        same(stored.values.view(torch.uint8), codes)
        same(stored.scales.view(-1), scales.ravel())


@every_case
@pytest.mark.parametrize("scaling", ["ceil", "floor"])
def test_mxfp8(matrix: Tensor, scaling: mxfp8.Scaling) -> None:
    stored = mxfp8.quantise(matrix, scaling)
    codes, scales = oracle.mxfp8(numbers(matrix), floor=scaling == "floor")
    same(stored.values.view(torch.uint8), codes)
    same(elements.from_e8m0(stored.exponents), scales)


@every_case
def test_nvfp4(matrix: Tensor) -> None:
    stored = nvfp4.quantise(matrix)
    codes, scales, outer = oracle.nvfp4(numbers(matrix))
    same(stored.outer, outer)
    same(stored.scales, scales)
    same(stored.codes, codes)


@every_case
def test_int4(matrix: Tensor) -> None:
    symmetric = int4_group.quantise(matrix, 16)
    values, scales = oracle.int4(numbers(matrix), 16)
    same(symmetric.values, values)
    same(symmetric.scales, scales)
    asymmetric = int4_group.quantise(matrix, 16, symmetric=False)
    values, zeros, scales = oracle.int4_asymmetric(numbers(matrix), 16)
    assert asymmetric.zeros is not None
    same(asymmetric.scales, scales)
    same(asymmetric.zeros + 8, zeros)
    same(asymmetric.values + 8, values)


@every_case
def test_int8(matrix: Tensor) -> None:
    stored = int8.quantise(matrix)
    values, scales = oracle.int8(numbers(matrix))
    same(stored.values, values)
    same(stored.scales, scales)


def test_the_encodings_are_torchs_and_the_specifications() -> None:
    """All e4m3 codes; e2m1 by table; e8m0 for every exponent. fp32 between them by random bits."""
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=torch.Generator().manual_seed(0)).int()
    some = bits.view(torch.float32)
    some = some[some.isfinite()]
    scaled = some.sign() * some.abs().log10().abs() ** 2
    expected = [oracle.e4m3(number) for number in scaled.numpy()]
    same(elements.to_e4m3(scaled.clone()).view(torch.uint8), np.array(expected))
    assert torch.equal(elements.to_e4m3(scaled.clone()).view(torch.uint8),
                       scaled.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))  # fmt: skip
    same(elements.to_e2m1(scaled), np.array([oracle.e2m1(number) for number in scaled.numpy()]))
    codes = torch.arange(16, dtype=torch.uint8)
    same(elements.from_e2m1(codes), np.array(oracle.E2M1 + [-value for value in oracle.E2M1]))
    exponents = torch.arange(255, dtype=torch.uint8)
    powers = elements.from_e8m0(exponents)
    same(powers, np.array([2.0 ** (int(e) - 127) for e in exponents], np.float32))
    assert torch.equal(elements.to_e8m0(powers), exponents)
    assert elements.from_e8m0(torch.tensor([255], dtype=torch.uint8)).isnan()
    assert elements.to_e8m0(torch.tensor([torch.nan])) == 255
