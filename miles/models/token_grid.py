"""Sequences that lie one after another in the flat tokens, laid out as a right-padded grid and back.

Shapes: T tokens, N sequences, H heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TokenGrid:
    """The places of flat tokens in a grid of one row per sequence.

    Args:
        cu_seqlens: [N + 1] whole numbers, sequence n is tokens cu_seqlens[n] : cu_seqlens[n + 1].
        longest_first: grid rows are ordered by falling length; otherwise as the sequences come.
    """

    def __init__(self, cu_seqlens: Tensor, longest_first: bool = False) -> None:
        self._starts = cu_seqlens[:-1].long()
        self._lengths = cu_seqlens[1:].long() - self._starts
        self.num_sequences = self._lengths.numel()
        self.sequence_of_token = torch.repeat_interleave(self._lengths)
        self.position_of_token = (
            torch.arange(self.sequence_of_token.numel(), device=self._starts.device)
            - self._starts[self.sequence_of_token]
        )
        self._order: Tensor | None = None
        if longest_first:
            self._order = torch.argsort(self._lengths, descending=True, stable=True)
        self._layouts: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @property
    def lengths(self) -> Tensor:
        """int64 [N], in the order of grid rows."""
        return self._lengths if self._order is None else self._lengths[self._order]

    def lay_out(self, x: Tensor, width: int) -> Tensor:
        """x [T, H, d] -> [N, H, width, d]. Cells past a sequence's end hold its first token: finite."""
        heads = x.shape[1]
        rows, cells = self._layout(heads, width)
        return _Gather.apply(x.flatten(0, 1), rows, cells).view(self.num_sequences, heads, width, x.shape[2])

    def flatten(self, grid: Tensor) -> Tensor:
        """grid [N, H, width, d] -> [T, H * d]."""
        _, heads, width, head_dim = grid.shape
        rows, cells = self._layout(heads, width)
        return _Gather.apply(grid.reshape(-1, head_dim), cells, rows).view(-1, heads * head_dim)

    def _layout(self, heads: int, width: int) -> tuple[Tensor, Tensor]:
        """The flat row (token, head) of each cell, and the cell (sequence, head, position) of each row."""
        if (heads, width) not in self._layouts:
            steps = torch.arange(width, device=self._starts.device)
            starts, lengths = (x.unsqueeze(1) for x in (self._starts, self._lengths))
            row_of_sequence = torch.arange(self.num_sequences, device=steps.device)
            if self._order is not None:
                starts, lengths = starts[self._order], lengths[self._order]
                row_of_sequence = torch.argsort(self._order)
            token_of_cell = starts + steps * (steps < lengths)
            head = torch.arange(heads, device=steps.device)
            rows = token_of_cell.unsqueeze(1) * heads + head.unsqueeze(1)
            grid_row = row_of_sequence[self.sequence_of_token].unsqueeze(1) * heads + head
            cells = grid_row * width + self.position_of_token.unsqueeze(1)
            self._layouts[heads, width] = (rows.flatten(), cells.flatten())
        return self._layouts[heads, width]


class _Gather(torch.autograd.Function):
    """x[rows], whose gradient goes back only through `cells`, the rows of the output that carry data.

    torch's own backward adds row by row; here every row of x has one reader that matters, or none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, cells: Tensor) -> Tensor:
        ctx.save_for_backward(rows, cells)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, cells = ctx.saved_tensors
        if cells.numel() <= rows.numel():
            return grad.index_select(0, cells), None, None
        return grad.new_zeros(cells.numel(), grad.shape[1]).index_copy_(0, rows, grad), None, None
