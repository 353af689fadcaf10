"""The gated activation silu(gate) * up over a fused [gate, up] projection, with a hand-written backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Forward = Callable[[Tensor], Tensor]


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """[T, 2I] -> [T, I] without autograd. torch's silu rounds the last columns of a run of elements otherwise
    than the rest: a run is a row in one thread, and any part of a row in several."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def swiglu_of_exp(gate_up: Tensor) -> Tensor:
    """The same from exp, sum and quotient in fp32, where an element's bits do not depend on its place."""
    gate, up = gate_up.float().chunk(2, -1)
    denominator = torch.neg(gate).exp_().add_(1)
    return torch.div(gate, denominator, out=denominator).mul_(up).to(gate_up.dtype)


def swiglu(gate_up: Tensor, forward: Forward = swiglu_forward) -> Tensor:
    """[T, 2I] -> [T, I], computed by `forward`."""
    if torch.is_grad_enabled():
        return _SwiGlu.apply(gate_up, forward)
    return forward(gate_up)


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of `gate_up` [T, 2I] for a gradient [T, I] of the result."""
    gate, up = gate_up.chunk(2, -1)
    grad_gate_up = torch.empty_like(gate_up)
    grad_gate, grad_up = grad_gate_up.chunk(2, -1)
    torch.mul(grad, F.silu(gate), out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return grad_gate_up


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, forward: Forward) -> Tensor:
        ctx.save_for_backward(gate_up)
        return forward(gate_up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return swiglu_backward(grad, *ctx.saved_tensors), None
