"""Projections whose output is normed before it is added to the residual stream (Gemma).

The norm is called `post_layernorm` and lies in the projection, as in NVIDIA's Megatron-Bridge, so that
distributed checkpoints call it alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Norm = Callable[..., nn.Module]


def with_output_norm(projection: type[nn.Module], norm: Norm) -> type[nn.Module]:
    """A class like `projection` (a row-parallel one of Megatron's), with a norm of megatron-core's arguments
    behind it and behind its bias.
    """

    class NormedProjection(projection):
        def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
            super().__init__(input_size, output_size, config=config, **options)
            self.post_layernorm = norm(config=config, hidden_size=output_size, eps=config.layernorm_epsilon)

        def forward(self, *arguments: Any, **options: Any) -> tuple[Tensor, None]:
            output, bias = super().forward(*arguments, **options)
            return self.post_layernorm(output if bias is None else output + bias), None

    return NormedProjection
