"""RMSNorm (https://arxiv.org/abs/1910.07467), statistics in fp32, with a hand-written backward.

torch's own version is a composite operation on CPU: its backward alone costs three times this one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool = False) -> Tensor:
    """weight * x / sqrt(mean(x²) + eps) over the last dimension; the result has x's dtype.

    Args:
        x: [..., D].
        weight: broadcastable to x, [D] or [H, D].
        plus_one: multiply with 1 + weight instead, and round once, behind the product (Gemma).
    """
    if plus_one:
        return rms_norm(x.float(), weight.float() + 1, eps).to(x.dtype)
    if torch.is_grad_enabled():
        return _RmsNorm.apply(x, weight, eps)
    return _normalize(x, eps)[0].to(x.dtype).mul_(weight)


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) in fp32 (a new tensor), and 1 / rms(x) [..., 1]."""
    x = x.float()
    # A sum and a product: twice as fast as torch's mean on few rows.
    rstd = x.square().sum(-1, keepdim=True).mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return x * rstd, rstd


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normalized, rstd = _normalize(x, eps)
        ctx.save_for_backward(x, weight, rstd)
        return normalized.to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        normalized = x.float() * rstd
        grad = grad.float()
        grad_weight = (grad * normalized).sum_to_size(weight.shape).to(weight.dtype)
        grad_normalized = grad * weight
        along = (grad_normalized * normalized).mean(-1, keepdim=True)
        grad_x = grad_normalized.sub_(normalized.mul_(along)).mul_(rstd)
        return grad_x.to(x.dtype), grad_weight, None
