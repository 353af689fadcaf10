"""`norm.rms_norm` of fp32 rows, compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles.models.compiled.library import Library, addresses


def rms_norm(library: Library, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, D], weight [D], see `norm.rms_norm`."""
    if torch.is_grad_enabled():
        out: Tensor = _RmsNorm.apply(x, weight, eps, library)
        return out
    return _forward(library, x.contiguous(), weight, eps)[0]


def _forward(library: Library, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, rstd = torch.empty_like(x), x.new_empty(x.shape[0])
    library.norm(*addresses(x, weight), eps, *x.shape, *addresses(out, rstd))
    return out, rstd


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, library: Library) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        out, rstd = _forward(library, x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.library = library
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        grad, grad_x, grad_weight = grad.contiguous(), torch.empty_like(x), torch.empty_like(weight)
        ctx.library.norm_backward(
            *addresses(grad, x, weight, rstd), *x.shape, *addresses(grad_x, grad_weight)
        )
        return grad_x, grad_weight, None, None
