"""Block FP8 products and casts on a GPU beside the same on the CPU."""

from __future__ import annotations

import pytest
import torch

from miles.precision import fp8_block
from miles.precision.fp8_matmul import HOPPER, matmul

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def operands(device: str) -> tuple[fp8_block.BlockFp8, fp8_block.BlockFp8]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(96, 384, generator=generator).to(device)
    weight = (torch.randn(256, 384, generator=generator) * 0.02).to(device)
    return fp8_block.quantise(tokens, block=fp8_block.ACTIVATIONS), fp8_block.quantise(weight)


def test_casts_are_the_cpus_bit_for_bit() -> None:
    for here, there in zip(operands("cpu"), operands("cuda"), strict=True):
        assert torch.equal(here.scales, there.scales.cpu())
        assert torch.equal(here.values.view(torch.uint8), there.values.cpu().view(torch.uint8))


def test_cublas_multiplies_as_the_dequantised_product_does() -> None:
    if torch.cuda.get_device_capability() != HOPPER:
        pytest.skip("cuBLAS has this pair of blocks on Hopper alone")
    exact = matmul(*operands("cpu"), dtype=torch.float32)
    found = matmul(*operands("cuda")).float().cpu()
    assert float((found - exact).norm() / exact.norm()) < 5e-3
