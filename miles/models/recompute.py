"""Activations that backward computes again instead of keeping them (https://arxiv.org/abs/1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

RecomputedModule = Literal["core_attn", "mlp", "moe"]
"""Parts of a layer, as Megatron names them: attention between its projections; the dense block with the norm
before it; the experts with their router and norm. A router dispatches to the same experts again."""


RECOMPUTED_MODULES: tuple[RecomputedModule, ...] = get_args(RecomputedModule)


def once(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """function(*inputs); backward finds all that it made."""
    return function(*inputs)


def again(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """The same, but where there is a backward, it finds the inputs only and runs the function once more."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    out: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return out
