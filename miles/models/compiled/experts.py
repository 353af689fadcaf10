"""`experts.routed_experts` in fp32, compiled: from gathering to the sum, some rows at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from miles.models.compiled.library import WIDTH_STEP, ExpertSizes, Library, addresses, plain

MOST_WIDTH = 128
"""Wider matrices are quicker in torch's matrix library."""


def takes(gate_up: Tensor, down: Tensor) -> bool:
    """Whether `routed_experts` computes these."""
    widths = down.shape[1:]
    fits = all(width % WIDTH_STEP == 0 and width <= MOST_WIDTH for width in widths)
    return fits and plain(gate_up, down) and gate_up.is_contiguous() and down.is_contiguous()


def routed_experts(
    library: Library, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """See `experts.routed_experts`. A token's experts are added in the order of their ids."""
    if torch.is_grad_enabled():
        out: Tensor = _RoutedExperts.apply(x, ids, weights, gate_up, down, library)
        return out
    return _forward(library, x, ids, weights, gate_up, down)[0]


class _Done(NamedTuple):
    """The result, each row's first projection, the choice of each row, and where experts begin."""

    out: Tensor
    projected: Tensor
    order: Tensor
    starts: Tensor


def _sizes(ids: Tensor, down: Tensor) -> ExpertSizes:
    return ExpertSizes(*ids.shape, *down.shape)


def _forward(
    library: Library, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> _Done:
    x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
    choices, experts = ids.numel(), down.shape[0]
    done = _Done(
        torch.empty_like(x),
        x.new_empty(choices, gate_up.shape[1]),
        ids.new_empty(choices),
        ids.new_empty(experts + 1),
    )
    library.experts(_sizes(ids, down), *addresses(x, ids, weights, gate_up, down, *done))
    return done


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, library: Library
    ) -> Tensor:
        done = _forward(library, x, ids, weights, gate_up, down)
        ctx.save_for_backward(x.contiguous(), weights.contiguous(), gate_up, down, *done[1:])
        ctx.library, ctx.sizes = library, _sizes(ids, down)
        return done.out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad, saved = grad.contiguous(), ctx.saved_tensors
        x, weights, gate_up, down = saved[:4]
        grads = [torch.empty_like(tensor) for tensor in (x, weights, gate_up, down)]
        ctx.library.experts_backward(ctx.sizes, *addresses(grad, *saved, *grads))
        grad_x, grad_weights, grad_gate_up, grad_down = grads
        return grad_x, None, grad_weights, grad_gate_up, grad_down, None
