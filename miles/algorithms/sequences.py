"""Where each sequence lies in a flat row of tokens, and sums, means and broadcasts over sequences.

Shape legend: T rows (tokens), N sequences.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Sequences:
    """Boundaries of N sequences packed one after the other in T rows.

    Args:
        cu_seqlens_N1: int tensor [N + 1], cumulative lengths from 0 to T. Empty sequences are allowed.
    """

    def __init__(self, cu_seqlens_N1: Tensor) -> None:
        self.cu_seqlens_N1 = cu_seqlens_N1.long()
        self.lengths_N = self.cu_seqlens_N1[1:] - self.cu_seqlens_N1[:-1]

    @property
    def count(self) -> int:
        """N, the number of sequences."""
        return self.lengths_N.numel()

    @cached_property
    def num_rows(self) -> int:
        """T, the number of rows."""
        return int(self.cu_seqlens_N1[-1])

    @cached_property
    def index_T(self) -> Tensor:
        """int64 [T]: the sequence that each row belongs to."""
        return self.expand(torch.arange(self.count, device=self.lengths_N.device))

    def sum(self, values_T: Tensor) -> Tensor:
        """Sum per sequence, [T] -> [N]; 0 for an empty one. Rows are added in order: stable bits."""
        return torch.segment_reduce(values_T, "sum", lengths=self.lengths_N, initial=0.0, unsafe=True)

    def mean(self, values_T: Tensor, mask_T: Tensor) -> Tensor:
        """Mean over rows of mask 1 per sequence, [T] -> [N]; 0 where a sequence has none."""
        return self.sum(values_T * mask_T) / self.sum(mask_T).clamp_min(1.0)

    def expand(self, values_N: Tensor) -> Tensor:
        """Give every row the value of its sequence, [N] -> [T]."""
        return torch.repeat_interleave(values_N, self.lengths_N, output_size=self.num_rows)
