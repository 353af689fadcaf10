"""The gated activation gelu(gate) * up over a fused [gate, up] projection, gelu by its tanh approximation."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Gelu = Callable[[Tensor], Tensor]


def gelu(x: Tensor) -> Tensor:
    """torch's: it rounds the last elements of a run otherwise than the rest."""
    return F.gelu(x, approximate="tanh")


def gelu_of_exp(x: Tensor) -> Tensor:
    """The same from products, sums, exp and a quotient in fp32, where an element's bits do not depend on its
    place: x (1 + tanh u) / 2 = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x³)
    (https://arxiv.org/abs/1606.08415)."""
    if torch.is_grad_enabled():
        out: Tensor = _GeluOfExp.apply(x)
        return out
    wide = x.float()
    exponent = wide.square().mul_(0.044715).add_(1).mul_(wide).mul_(-2 * math.sqrt(2 / math.pi))
    return torch.div(wide, exponent.exp_().add_(1)).to(x.dtype)


class _GeluOfExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return gelu_of_exp(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


def geglu(gate_up: Tensor, sparsity: float = 0.0, activation: Gelu = gelu) -> Tensor:
    """[T, 2I] -> [T, I] (https://arxiv.org/abs/2002.05202).

    sparsity: see `DenseMlpSpec`.
    """
    gate, up = gate_up.chunk(2, -1)
    return activation(_cut(gate, sparsity) if sparsity else gate) * up


def _cut(gate: Tensor, sparsity: float) -> Tensor:
    """What of each row lies above the point that `sparsity` of a normal distribution lies below."""
    deviations = torch.tensor(NormalDist().inv_cdf(sparsity), dtype=gate.dtype)
    cut = gate.mean(-1, keepdim=True) + gate.std(-1, keepdim=True, correction=0) * deviations
    return F.relu(gate - cut)
