"""The gated activation gelu(gate) * up over a fused [gate, up] projection, gelu by its tanh approximation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def geglu(gate_up: Tensor) -> Tensor:
    """[T, 2I] -> [T, I] (https://arxiv.org/abs/2002.05202, https://arxiv.org/abs/1606.08415)."""
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up
