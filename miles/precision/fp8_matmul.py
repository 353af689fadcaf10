"""Products of block FP8 matrices: cuBLAS on Hopper, the dequantised product elsewhere.

Legend: T tokens, N outputs, K inputs, B = 128.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.precision.fp8_block import ACTIVATIONS, WEIGHTS, BlockFp8, dequantise

HOPPER = (9, 0)
"""cuBLAS has 1x128 times 128x128 blocks on this compute capability alone."""
SCALE_ROWS = 4
"""cuBLAS wants the number of scales along K to be a multiple of this."""


def matmul(tokens: BlockFp8, weight: BlockFp8, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """tokens [T, K] times weight [N, K] transposed, `dtype` [T, N].

    tokens have a scale for 128 numbers of a row, the weight one for 128x128; both sums run in fp32. On Hopper
    K and N must be multiples of 128.
    """
    assert tokens.block == ACTIVATIONS and weight.block == WEIGHTS, "the pair of the blockwise recipe"
    device = tokens.values.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER:
        return _on_hopper(tokens, weight, dtype)
    return (dequantise(tokens) @ dequantise(weight).T).to(dtype)


def _on_hopper(tokens: BlockFp8, weight: BlockFp8, dtype: torch.dtype) -> Tensor:
    """Scales of tokens lie column after column; those of the weight with K innermost, filled up."""
    filled = F.pad(weight.scales, (0, -weight.scales.shape[1] % SCALE_ROWS))
    return F.scaled_mm(
        tokens.values,
        weight.values.T,
        scale_a=tokens.scales.T.contiguous().T,
        scale_recipe_a=F.ScalingType.BlockWise1x128,
        scale_b=filled.T,
        scale_recipe_b=F.ScalingType.BlockWise128x128,
        output_dtype=dtype,
    )
