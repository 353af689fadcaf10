"""Fake quantisation: the forward sees rounded numbers, the gradient passes as if nothing had been rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

RoundTrip = Callable[[Tensor], Tensor]
"""A matrix [rows, N] of any float dtype -> what its stored form stands for, same shape."""


def straight_through(numbers: Tensor, round_trip: RoundTrip) -> Tensor:
    """`round_trip(numbers)` in the dtype of `numbers` [..., N], with the identity as its gradient
    (https://arxiv.org/abs/1308.3432), saturated numbers included.
    """
    return _StraightThrough.apply(numbers, round_trip)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: Tensor, round_trip: RoundTrip) -> Tensor:
        matrix = numbers.detach().reshape(-1, numbers.shape[-1])
        return round_trip(matrix).to(numbers.dtype).view(numbers.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
