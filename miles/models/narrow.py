"""Products of narrow numbers on a processor without instructions for them.

Without vectors of bf16 torch leaves such products to loops of 4 to 40 times the time of fp32. There the
operands are widened, sums are in fp32 and the result is rounded once: the number format stays the same.
Shapes: T rows, K inputs, N outputs; [H, ...] in front of all of them for a product per head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FEWEST_ROWS = 16
"""Products with fewer rows cost less than widening a matrix that is in no cache."""


def is_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of `dtype` are left to loops without vectors of it: many times slower than in fp32."""
    if dtype == torch.float32 or device.type != "cpu":
        return False
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return not supported


def pays_widened(x: Tensor, rows: int) -> bool:
    """Whether a product of `rows` rows of x's kind is quicker in fp32."""
    return rows >= FEWEST_ROWS and is_slow(x.dtype, x.device)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, of operands that need no gradient, in fp32 where that is quicker."""
    if is_slow(left.dtype, left.device):
        return torch.matmul(left.float(), right.float()).to(left.dtype)
    return torch.matmul(left, right)


def widened_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K] @ weight [N, K]ᵀ + bias [N] -> [T, N] in x's type; so are all gradients."""
    if torch.is_grad_enabled():
        out: Tensor = _WidenedLinear.apply(x, weight, bias)
        return out
    return _widened(x, weight, bias)


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.matmul(x.float(), weight.float().mT)
    return (out if bias is None else out.add_(bias)).to(x.dtype)


class _WidenedLinear(torch.autograd.Function):
    """Keeps the narrow operands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _widened(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            product(grad, weight) if of_x else None,
            product(grad.mT, x) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )
