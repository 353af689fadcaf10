"""Matrix products of row groups: group e is rows ends[e-1] : ends[e] of a tensor sorted by group.

torch's grouped_mm wants rows of a multiple of 16 bytes; other widths run group by group.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.models.narrow import pays_widened

_ALIGNMENT = 16
"""Bytes."""


def grouped_mm(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """rows[group e] @ matrices[e] for every group.

    Args:
        rows: [R, A]. matrices: [E, A, B]; either of A, B contiguous. ends: int32 [E].

    Returns:
        [R, B].
    """
    if pays_widened(rows, rows.shape[0] // len(matrices)):
        return grouped_mm(rows.float(), matrices.float(), ends).to(rows.dtype)
    if _aligned(rows.shape[1], matrices.shape[2], rows.element_size()):
        return F.grouped_mm(rows, matrices, offs=ends)
    out = rows.new_empty(rows.shape[0], matrices.shape[2])
    for matrix, (begin, end) in zip(matrices, _ranges(ends), strict=True):
        torch.mm(rows[begin:end], matrix, out=out[begin:end])
    return out


def grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """left[group e]ᵀ @ right[group e] for every group; zero for an empty one.

    Args:
        left: [R, A]. right: [R, B]. ends: int32 [E].

    Returns:
        [E, A, B].
    """
    if pays_widened(left, left.shape[0] // len(ends)):
        return grouped_outer(left.float(), right.float(), ends).to(left.dtype)
    if _aligned(left.shape[1], right.shape[1], left.element_size()):
        return F.grouped_mm(left.t(), right, offs=ends)
    out = left.new_empty(ends.numel(), left.shape[1], right.shape[1])
    for matrix, (begin, end) in zip(out, _ranges(ends), strict=True):
        torch.mm(left[begin:end].t(), right[begin:end], out=matrix)
    return out


def _aligned(width: int, other: int, itemsize: int) -> bool:
    return width * itemsize % _ALIGNMENT == 0 and other * itemsize % _ALIGNMENT == 0


def _ranges(ends: Tensor) -> list[tuple[int, int]]:
    return list(pairwise([0, *ends.tolist()]))
