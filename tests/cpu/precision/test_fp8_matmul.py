"""Products of block FP8 matrices, where no kernel has them."""

from __future__ import annotations

import torch

from miles.precision import fp8_block
from miles.precision.fp8_matmul import matmul


def test_the_product_is_that_of_the_rounded_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, weight = torch.randn(5, 320, generator=generator), torch.randn(130, 320, generator=generator)
    left = fp8_block.quantise(tokens, block=fp8_block.ACTIVATIONS)
    right = fp8_block.quantise(weight)
    found = matmul(left, right, torch.float32)
    assert torch.equal(found, fp8_block.dequantise(left) @ fp8_block.dequantise(right).T)
    exact = tokens @ weight.T
    assert 0.01 < float((found - exact).norm() / exact.norm()) < 0.06, "the error of two roundings"
