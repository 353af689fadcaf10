"""The arithmetic that all formats share: peaks of blocks, numbers over the scale of their block, and back.

Works through a matrix a strip of rows at a time, so that beside the result it holds a few MB at any size.
Legend: M rows, N columns, blocks of P x Q; Mb = ceil(M / P), Nb = ceil(N / Q); a block at the edge may be
smaller.

A block that holds an infinity or a NaN has the peak NaN, hence the scale NaN, and stands for NaN in all of
its numbers: nothing is hidden. `published` refuses to write it down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.errors import MilesError

STRIP = 1 << 19
"""Numbers worked on at a time, unless a single row of blocks has more."""

Block = tuple[int, int]


def block_peaks(matrix: Tensor, block: Block) -> Tensor:
    """max|x| of each block, fp32 [Mb, Nb]; NaN where the block has a number that is not finite."""
    peaks = [_tiles(matrix[rows].float(), block).abs().amax((1, 3)) for rows in _strips(matrix, block)]
    found = torch.cat(peaks)
    return found.where(found.isfinite(), torch.nan)


def block_ranges(matrix: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Smallest and largest number of each block, fp32 [Mb, Nb] each; NaN as in `block_peaks`.

    Rows and columns must be whole blocks: the filling would count as zeros.
    """
    ends = []
    for rows in _strips(matrix, block):
        tiles = _tiles(matrix[rows].float(), block)
        ends.append((tiles.amin((1, 3)), tiles.amax((1, 3))))
    low, high = (torch.cat(parts) for parts in zip(*ends, strict=True))
    finite = low.isfinite() & high.isfinite()
    return low.where(finite, torch.nan), high.where(finite, torch.nan)


def over_scales(
    matrix: Tensor, scales: Tensor, block: Block, cast: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> Tensor:
    """cast(x / scale) of every number, `dtype` [M, N].

    scales: [Mb, Nb], any float dtype. `cast` may change the fp32 quotients of a strip in place.
    """
    values = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    for rows in _strips(matrix, block):
        tiles = _tiles(matrix[rows].float(), block) / _spread(scales, rows, block)
        values[rows] = cast(_flat(tiles, values[rows].shape))
    return values


def times_scales(
    values: Tensor,
    scales: Tensor,
    block: Block,
    dtype: torch.dtype = torch.float32,
    decode: Callable[[Tensor], Tensor] = Tensor.float,
) -> Tensor:
    """decode(value) * scale of every number, computed in fp32 and rounded to `dtype` [M, N]."""
    matrix = torch.empty(values.shape, dtype=dtype, device=values.device)
    for rows in _strips(values, block):
        tiles = _tiles(decode(values[rows]), block) * _spread(scales, rows, block)
        matrix[rows] = _flat(tiles, matrix[rows].shape)
    return matrix


def check_groups(matrix: Tensor, size: int, format_name: str, where: str = "precision") -> None:
    """MilesError where groups of a row's numbers do not fill the row: no kernel reads such a layout."""
    columns = matrix.shape[-1]
    if columns % size:
        raise MilesError(
            f"rows of {columns} weights cannot be cut into {format_name} groups of {size}",
            where=where,
            fix="keep these tensors in bf16: --extra-high-precision-layers-hf NAME",
        )


def check_finite(scales: Tensor, name: str) -> None:
    """MilesError naming the tensor where a block held an infinity or a NaN."""
    bad = int((~scales.float().isfinite()).sum())
    if bad:
        raise MilesError(
            f"{name} has infinities or NaN in {bad} of its {scales.numel()} blocks",
            why="no number format stores them; the engine would sample from noise",
            fix="find the step that made them: miles diagnose; resume from the checkpoint before",
        )


def _strips(matrix: Tensor, block: Block) -> Iterator[slice]:
    """Whole rows of blocks, as many as a strip takes."""
    rows, columns = matrix.shape
    step = max(STRIP // max(columns, 1) // block[0], 1) * block[0]
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _tiles(strip: Tensor, block: Block) -> Tensor:
    """[rows, N] -> [rows of blocks, P, Nb, Q], filled up with zeros."""
    (rows, columns), (high, wide) = strip.shape, block
    if rows % high or columns % wide:
        strip = F.pad(strip, (0, -columns % wide, 0, -rows % high))
    return strip.reshape(-1, high, strip.shape[1] // wide, wide)


def _flat(tiles: Tensor, shape: torch.Size) -> Tensor:
    return tiles.reshape(tiles.shape[0] * tiles.shape[1], -1)[: shape[0], : shape[1]]


def _spread(scales: Tensor, rows: slice, block: Block) -> Tensor:
    """The scales of a strip, fp32 [rows of blocks, 1, Nb, 1]."""
    return scales[rows.start // block[0] : -(-rows.stop // block[0])].float()[:, None, :, None]
