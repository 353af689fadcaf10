"""Ranges of flat rows laid out as grids of like length: the rows of a grid are padded, but by little.

Shapes: T rows, M ranges of them, m ranges of one grid, W its width (its longest range), h heads, d head
width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_FREE_PADDING = 16
"""Rows of padding that cost less than a grid of its own."""

_PADDED_SHARE = 0.2
"""Of a wide grid's width, at most so much is padding."""


@dataclass(frozen=True)
class RowGrid:
    """m ranges of W rows each. Either they are all rows from `begin` to `end`, or they are gathered.

    `rows` int64 [m W]: the row of each cell, where a cell behind a range's end holds the range's first row.
    `padding` int64: those cells; None when there are none.
    """

    count: int
    width: int
    begin: int
    end: int
    rows: Tensor | None = None
    padding: Tensor | None = None

    def take(self, x: Tensor, zero_padding: bool = False) -> Tensor:
        """x [T, h, ...] -> [m, h, W, ...]; a view where no row has to move."""
        cells = x[self.begin : self.end] if self.rows is None else x.index_select(0, self.rows)
        if zero_padding and self.padding is not None:
            cells.index_fill_(0, self.padding, 0)
        return cells.unflatten(0, (self.count, self.width)).transpose(1, 2)

    def add_to(self, x: Tensor, grid: Tensor) -> None:
        """Add a grid [m, h, W, ...] without padding to its rows of x [T, h, ...], in place."""
        cells = grid.transpose(1, 2).flatten(0, 1)
        if self.rows is None:
            x[self.begin : self.end] += cells
        else:
            x.index_add_(0, self.rows, cells)


class RowGrids:
    """All grids of M ranges that lie one after another, longest ranges first.

    Args:
        starts: int64 [M], the first row of each range. lengths: int64 [M], none 0.
        groups: int64 [M]; ranges that differ in it never share a grid. None: all may.
    """

    def __init__(
        self,
        starts: np.ndarray,
        lengths: np.ndarray,
        device: torch.device,
        groups: np.ndarray | None = None,
    ) -> None:
        self.members: list[np.ndarray] = like_lengths(lengths, groups)
        self.grids = [row_grid(starts[members], lengths[members], device) for members in self.members]
        self._place = self._places(starts, lengths, device)

    def put(self, grids: list[Tensor]) -> Tensor:
        """The way back: one [m, h, W, ...] per grid -> [rows of all ranges, h, ...]."""
        cells = [grid.transpose(1, 2).flatten(0, 1) for grid in grids]
        joined = cells[0] if len(cells) == 1 else torch.cat(cells)
        return joined if self._place is None else joined.index_select(0, self._place)

    def _places(self, starts: np.ndarray, lengths: np.ndarray, device: torch.device) -> Tensor | None:
        """For every row, in row order, its cell among those of all grids; None when that is its number."""
        first = int(starts.min())
        place = np.empty(int(lengths.sum()), np.int64)
        offset = 0
        for members, grid in zip(self.members, self.grids, strict=True):
            inside = np.arange(grid.width) < lengths[members, None]
            rows = starts[members, None] - first + np.arange(grid.width)
            cells = np.arange(rows.size).reshape(rows.shape) + offset
            place[rows[inside]] = cells[inside]
            offset += rows.size
        if offset == len(place) and (place == np.arange(offset)).all():
            return None
        return torch.from_numpy(place).to(device)


def like_lengths(lengths: np.ndarray, groups: np.ndarray | None = None) -> list[np.ndarray]:
    """Indices of ranges that are padded together, each list in ascending order, longest ranges first."""
    groups = np.zeros(len(lengths), np.int64) if groups is None else groups
    result = []
    order = np.lexsort((np.arange(len(lengths)), -lengths, groups))
    while len(order):
        widest = lengths[order[0]]
        least = widest - max(_FREE_PADDING, int(_PADDED_SHARE * widest))
        fits = (lengths[order] >= least) & (groups[order] == groups[order[0]])
        result.append(np.sort(order[fits]))
        order = order[~fits]
    return result


def row_grid(starts: np.ndarray, lengths: np.ndarray, device: torch.device) -> RowGrid:
    """Ranges anywhere among the rows, given in ascending order, as one grid."""
    count, width = len(starts), int(lengths.max())
    begin, end = int(starts[0]), int(starts[-1] + lengths[-1])
    if (lengths == width).all() and end - begin == count * width:
        return RowGrid(count, width, begin, end)
    steps = np.arange(width)
    outside = steps >= lengths[:, None]
    rows = starts[:, None] + np.where(outside, 0, steps)
    padding = torch.from_numpy(np.flatnonzero(outside)).to(device) if outside.any() else None
    return RowGrid(count, width, begin, end, torch.from_numpy(rows.ravel()).to(device), padding)
