"""Other people's readers understand what we publish: compressed-tensors for integers and FP8 by channel,
torch's and transformers' own for MXFP8, NVFP4 and block FP8.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from miles.precision import fp8_block, fp8_scaled, int4_group, int8, mxfp8, nvfp4


def weights(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05


def decompressed(layout: str, tensors: dict[str, Tensor], **arguments: Any) -> Tensor:
    """The weight that the compressed-tensors library makes of a published weight `a.weight`."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    local = {name.removeprefix("a."): tensor for name, tensor in tensors.items()}
    weight: Tensor = BaseCompressor.get_value_from_registry(layout).decompress(local, scheme)["weight"]
    return weight


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 128), (37, 96), (9, 12)])
def test_packed_int4_decompresses_to_our_weights_exactly(
    symmetric: bool, scale_dtype: Any, shape: Any
) -> None:
    group = 32 if shape[1] % 32 == 0 else 4
    stored = int4_group.quantise(weights(*shape), group, symmetric, scale_dtype)
    tensors = int4_group.published("a.weight", stored)
    assert tensors["a.weight_packed"].shape == (shape[0], -(-shape[1] // 8))
    arguments = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group}
    found = decompressed("pack-quantized", tensors, symmetric=symmetric, **arguments)
    assert found.dtype == scale_dtype
    assert torch.equal(found, int4_group.dequantise(stored, scale_dtype))


def test_int8_and_fp8_by_channel_decompress_to_our_weights_exactly() -> None:
    weight = weights(37, 96)
    integers = int8.quantise(weight)
    tensors = int8.published("a.weight", integers)
    found = decompressed("int-quantized", tensors, num_bits=8, type="int", strategy="channel")
    assert torch.equal(found, int8.dequantise(integers))
    for extent in ("channel", "tensor"):
        floats = fp8_scaled.quantise(weight, extent)  # type: ignore[arg-type]
        tensors = fp8_scaled.published("a.weight", floats)
        found = decompressed("float-quantized", tensors, num_bits=8, type="float", strategy=extent)
        assert torch.equal(found, fp8_scaled.dequantise(floats))


def test_nvfp4_codes_lie_two_in_a_byte_as_other_readers_expect() -> None:
    stored = nvfp4.quantise(weights(6, 64))
    tensors = nvfp4.published("a.weight", stored)
    packed = tensors["a.weight"]
    assert packed.dtype == torch.uint8 and packed.shape == (6, 32)
    values = unpack_fp4_from_uint8(packed, 6, 64, dtype=torch.float32)
    scales = tensors["a.weight_scale"].float().repeat_interleave(16, 1) * tensors["a.weight_scale_2"]
    assert torch.equal(values * scales, nvfp4.dequantise(stored))


@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
def test_transformers_reads_our_blocks_and_microscaling(scale_format: Any) -> None:
    weight = weights(256, 384)
    read = Fp8Dequantize(None)._dequantize_one
    block = fp8_block.quantise(weight, scale_format)
    tensors = fp8_block.published("a.weight", block)
    found = read(tensors["a.weight"], tensors["a.weight_scale_inv"], torch.float32)
    assert torch.equal(found, fp8_block.dequantise(block))
    micro = mxfp8.quantise(weight)
    tensors = mxfp8.published("a.weight", micro)
    found = read(tensors["a.weight"], tensors["a.weight_scale_inv"], torch.float32)
    assert torch.equal(found, mxfp8.dequantise(micro))
