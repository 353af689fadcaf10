"""RMSNorm that multiplies with 1 + weight (Gemma), where Megatron's own layers have torch's."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from miles.models.norm import rms_norm


class PlusOneNorm(nn.Module):
    """[..., D] -> the same. Takes the arguments of megatron-core's norms."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self._eps = eps
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        # By this mark gradients are summed over ranks that norm different rows.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self._eps, plus_one=True)
