"""The products and softmax of exact numerics on each kind of device: torch's on a CPU, where the probe finds
shapes that agree, kernels of our own on CUDA; and sums of a few terms."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
"""Numbers of fp32 in a vector of this processor."""


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """a [B, M, K] @ b [B, K, N]; without autograd on CUDA."""
    if not a.is_cuda:
        return torch.bmm(a, b)
    from miles.models.cuda import kernels

    return kernels.bmm(a, b)


def softmax(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Over the last dimension of an fp32 tensor; without autograd on CUDA."""
    if not x.is_cuda:
        return torch.softmax(x, -1) if out is None else torch.softmax(x, -1, out=out)
    from miles.models.cuda import kernels

    return kernels.softmax(x) if out is None else out.copy_(kernels.softmax(x))


def softmax_of_rows(x: Tensor) -> Tensor:
    """Over the last dimension of fp32 rows, with gradients: torch leaves rows shorter than a vector to scalar
    loops of six times the time, so they are filled up with what has probability 0."""
    width = x.shape[-1]
    if x.is_cuda or width >= LANES:
        return torch.softmax(x, -1)
    return torch.softmax(F.pad(x, (0, LANES - width), value=float("-inf")), -1)[..., :width]


def mm(x: Tensor, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """x [M, K] @ matrix [K, N]; without autograd on CUDA."""
    if not x.is_cuda:
        return torch.mm(x, matrix, out=out) if out is not None else torch.mm(x, matrix)
    product = bmm(x.unsqueeze(0), matrix.unsqueeze(0))[0]
    return product if out is None else out.copy_(product)


def in_order(terms: Iterable[Tensor]) -> Tensor:
    """Their sum, one after another: torch's reductions take another order at the end of a run."""
    total, *rest = terms
    for term in rest:
        total = total + term
    return total
