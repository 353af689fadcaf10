"""Stored weights as numbers: the tensors of a checkpoint for one weight, and the weight they stand for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from miles.arch.stored_weights import StoredWeight
from miles.precision import fp8_block, fp8_scaled, int4_group, int8, mxfp8, nvfp4
from miles.precision.weight_format import Stored, dequantised


def stored_form(weight: StoredWeight, parts: Mapping[str, Tensor]) -> Stored:
    """The quantised form out of a checkpoint's tensors, whatever its publisher calls them."""
    assert weight.format is not None
    name, kind = weight.name, weight.format.name
    if kind == "int4":
        # The stored shape is that of the whole matrix, where these may be some of its rows.
        shape = {f"{name}_shape": torch.tensor(weight.shape)}
        return int4_group.from_published(name, {**parts, **shape})
    if kind == "nvfp4":
        return _nvfp4(weight, parts)
    values, scales = parts[name], parts[weight.part("_scale_inv", "_scale") or name]
    if kind == "fp8":
        assert weight.block is not None
        return fp8_block.BlockFp8(values, scales.float(), weight.block)
    if kind == "mxfp8":
        return mxfp8.Mxfp8(values, scales.view(torch.uint8))
    if kind == "int8":
        return int8.ChannelInt8(values, scales.float().view(-1, 1))
    whole = (1,) if kind == "fp8_tensor" else (-1, 1)
    return fp8_scaled.ScaledFp8(values, scales.float().view(whole))


def _nvfp4(weight: StoredWeight, parts: Mapping[str, Tensor]) -> nvfp4.Nvfp4:
    """ModelOpt stores the outer scale; compressed-tensors stores what it is one over."""
    name = weight.name
    inverse = weight.part("_global_scale")
    if inverse is None:
        return nvfp4.from_published(name, dict(parts))
    outer = parts[inverse].float().reshape(()).reciprocal()
    tensors = {name: parts[f"{name}_packed"], f"{name}_scale": parts[f"{name}_scale"]}
    return nvfp4.from_published(name, tensors | {f"{name}_scale_2": outer})


def as_numbers(weight: StoredWeight, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`; products with scales are made in fp32 and rounded once."""
    if weight.format is None or weight.format.is_plain:
        return parts[weight.name].to(dtype)
    return dequantised(stored_form(weight, parts), dtype)
