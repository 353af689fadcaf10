"""Matrices that are fused or stacked out of several published ones, each of which is rounded by itself.

Blocks of a format never reach from one published matrix into the next. Rows whose blocks fit together are
rounded in one call. Legend: M rows, N columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from miles.arch.precision import NumberFormat
from miles.precision import fp8_block, mxfp8
from miles.precision.blocks import Block
from miles.precision.weight_format import Stored, dequantised, quantised

HIGH, WIDE = fp8_block.WEIGHTS


@dataclass(frozen=True)
class Run:
    """Rows start .. stop of the matrix, to be rounded in one call. `block`: of `fp8`, what shares a scale."""

    start: int
    stop: int
    block: Block = fp8_block.WEIGHTS


def runs(target: NumberFormat, pieces: Sequence[int]) -> tuple[Run, ...]:
    """How published matrices of so many rows each, one after another, are rounded.

    Whole blocks follow each other; pieces lower than a block are blocks themselves; of other heights each
    piece, whose last blocks are partial, is a run of its own.
    """
    if target.name != "fp8":
        return (Run(0, sum(pieces)),)
    return tuple(_fp8_runs(pieces))


def _fp8_runs(pieces: Sequence[int]) -> Iterator[Run]:
    start = 0
    for height, group in groupby(pieces, key=lambda rows: rows if rows % HIGH else HIGH):
        same = list(group)
        ends = same if height > HIGH else [sum(same)]
        for rows in ends:
            yield Run(start, start + rows, (min(height, HIGH), WIDE))
            start += rows


def quantised_run(target: NumberFormat, matrix: Tensor, run: Run) -> Stored:
    """The rows of a run [rows, N], in their format."""
    rows = matrix[run.start : run.stop]
    if target.name == "fp8":
        return fp8_block.quantise(rows, target.scales, run.block)
    return quantised(target, rows)


def round_trip(target: NumberFormat, matrix: Tensor, parts: Sequence[Run]) -> Tensor:
    """What the stored form of a matrix [M, N] stands for, in its dtype; products are rounded to it once."""
    rounded = [dequantised(quantised_run(target, matrix, run), matrix.dtype) for run in parts]
    return rounded[0] if len(rounded) == 1 else torch.cat(rounded)


def rounded_activations(target: NumberFormat, x: Tensor) -> Tensor:
    """x [..., N] as a product with weights of this format takes it, with the gradient of the identity."""
    if target.name == "fp8":
        return fp8_block.fake_quantise(x, target.scales, fp8_block.ACTIVATIONS)
    if target.name == "mxfp8":
        return mxfp8.fake_quantise(x)
    return x
