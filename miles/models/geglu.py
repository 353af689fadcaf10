"""The gated activation gelu(gate) * up over a fused [gate, up] projection, gelu by its tanh approximation."""

from __future__ import annotations

from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor


def geglu(gate_up: Tensor, sparsity: float = 0.0) -> Tensor:
    """[T, 2I] -> [T, I] (https://arxiv.org/abs/2002.05202, https://arxiv.org/abs/1606.08415).

    sparsity: see `DenseMlpSpec`.
    """
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(_cut(gate, sparsity) if sparsity else gate, approximate="tanh") * up


def _cut(gate: Tensor, sparsity: float) -> Tensor:
    """What of each row lies above the point that `sparsity` of a normal distribution lies below."""
    deviations = torch.tensor(NormalDist().inv_cdf(sparsity), dtype=gate.dtype)
    cut = gate.mean(-1, keepdim=True) + gate.std(-1, keepdim=True, correction=0) * deviations
    return F.relu(gate - cut)
