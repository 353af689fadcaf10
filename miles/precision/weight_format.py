"""Weights as an engine sees them that holds them in the formats of a precision policy.

An engine without kernels for a quantised format computes on the dequantised weights, so that it samples from
the same function as one that has them, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from miles.arch.precision import NumberFormat, PrecisionPolicy
from miles.precision import fp8_block, fp8_scaled, int4_group, int8, mxfp8, nvfp4

PLAIN: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INT4_SCALES = torch.bfloat16
"""Type of INT4 scales in published checkpoints, hence of the scales that weights are rounded with."""

Stored = (
    fp8_block.BlockFp8
    | fp8_scaled.ScaledFp8
    | mxfp8.Mxfp8
    | nvfp4.Nvfp4
    | int4_group.GroupInt4
    | int8.ChannelInt8
)

_MODULES: dict[type, Any] = {
    fp8_block.BlockFp8: fp8_block,
    fp8_scaled.ScaledFp8: fp8_scaled,
    mxfp8.Mxfp8: mxfp8,
    nvfp4.Nvfp4: nvfp4,
    int4_group.GroupInt4: int4_group,
    int8.ChannelInt8: int8,
}


def quantised(target: NumberFormat, matrix: Tensor, shared: Tensor | None = None) -> Stored:
    """A matrix [M, N] in a format that is not plain. Raises MilesError where its groups do not fill a row.

    shared: the scale of the whole tensor (`shared_scale`), where `matrix` is not all that has it.
    """
    if target.name == "fp8":
        return fp8_block.quantise(matrix, target.scales)
    if target.name == "fp8_channel":
        return fp8_scaled.quantise(matrix, "channel")
    if target.name == "fp8_tensor":
        return fp8_scaled.quantise(matrix, "tensor", shared)
    if target.name == "mxfp8":
        return mxfp8.quantise(matrix)
    if target.name == "nvfp4":
        return nvfp4.quantise(matrix, shared)
    if target.name == "int8":
        return int8.quantise(matrix)
    assert target.name == "int4", target.name
    return int4_group.quantise(matrix, target.group_size, target.symmetric, INT4_SCALES)


def shared_scale(target: NumberFormat, matrices: Iterable[Tensor]) -> Tensor | None:
    """The one scale of matrices that come one by one: the strips of a matrix, and for NVFP4 all matrices that
    a kernel multiplies as one. None for formats without such a scale.
    """
    if target.name not in ("nvfp4", "fp8_tensor"):
        return None
    scale = nvfp4.outer_scale if target.name == "nvfp4" else fp8_scaled.tensor_scale
    return torch.stack([scale(matrix) for matrix in matrices]).amax(0)


def dequantised(stored: Stored, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights that a stored form stands for, [M, N]."""
    weights: Tensor = _MODULES[type(stored)].dequantise(stored, dtype)
    return weights


def published(name: str, stored: Stored) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds for the weight `name`. Raises MilesError for weights not finite."""
    tensors: dict[str, Tensor] = _MODULES[type(stored)].published(name, stored)
    return tensors


def rounded(policy: PrecisionPolicy, name: str, tensor: Tensor) -> Tensor:
    """The tensor as the engine sees it: cast by a plain format; quantised and dequantised (fp32), or left as
    it is, by another one.
    """
    target = policy.storage(name)
    if policy.rollout.is_plain:
        return tensor.to(PLAIN[target.name])
    if target.is_plain:
        return tensor
    return dequantised(quantised(target, tensor))


def in_format(weights: Iterable[tuple[str, Tensor]], policy: PrecisionPolicy) -> Iterator[tuple[str, Tensor]]:
    """Weights under published names as the engine of this policy sees them, one at a time."""
    for name, tensor in weights:
        yield name, rounded(policy, name, tensor)
