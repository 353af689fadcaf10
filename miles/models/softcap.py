"""Soft caps: numbers that grow without bound are bent into (-cap, cap) (https://arxiv.org/abs/2408.00118)."""

from __future__ import annotations

import torch
from torch import Tensor


def softcapped(x: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(x / cap), element by element; x itself where there is no cap."""
    return x if cap is None else torch.tanh(x / cap) * cap


def softcap_slope(capped: Tensor, cap: float) -> Tensor:
    """The derivative, from the result: d (c · tanh(x / c)) / dx = 1 - tanh(x / c)²."""
    return 1 - (capped / cap).square_()
