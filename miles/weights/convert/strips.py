"""A matrix in strips of rows, as it is stored: formats round rows, or blocks of rows, by themselves.

So a large matrix passes through memory a strip at a time, and is rounded as if it were whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import lcm, prod

from miles.arch.safetensors_header import TensorEntry
from miles.arch.stored_forms import FP8_BLOCK
from miles.arch.stored_weights import StoredWeight

STRIP_NUMBERS = 1 << 22
"""Numbers that are rounded at a time, unless a block of rows has more."""
ZEROS_PER_ROW = 8
"""Zero points of INT4 are packed along the rows."""
WHOLE = ("_shape", "_scale_2", "_global_scale")
"""Parts that all rows share."""


def strips(weight: StoredWeight) -> Iterator[tuple[int, int]]:
    """First rows and ends; `uncut` for what is no matrix."""
    if len(weight.shape) != 2:
        yield uncut(weight)
        return
    rows, columns = weight.shape
    unit = lcm(FP8_BLOCK[0], (weight.block or FP8_BLOCK)[0])
    step = max(STRIP_NUMBERS // max(columns, 1) // unit, 1) * unit
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def uncut(weight: StoredWeight) -> tuple[int, int]:
    """All rows; a number counts as one."""
    return 0, (*weight.shape, 1)[0]


def rows_of(weight: StoredWeight, begin: int, end: int) -> StoredWeight:
    """The rows of a stored weight as a stored weight, without reading it. `begin` is where a block begins."""
    if not weight.shape or (begin, end) == (0, weight.shape[0]):
        return weight
    if weight.cut is not None:
        return replace(weight, shape=(end - begin, weight.shape[1]), cut=weight.cut.rows(begin, end))
    parts = {name: _rows_of_part(weight, name, entry, begin, end) for name, entry in weight.parts.items()}
    return replace(weight, shape=(end - begin, *weight.shape[1:]), parts=parts)


def _rows_of_part(weight: StoredWeight, name: str, entry: TensorEntry, begin: int, end: int) -> TensorEntry:
    together = _rows_together(weight, name.removeprefix(weight.name))
    if together is None:
        return entry
    first, last = begin // together, -(-end // together)
    row = entry.nbytes // entry.shape[0]
    shape = (last - first, *entry.shape[1:])
    assert row * entry.shape[0] == entry.nbytes and prod(shape) > 0
    return replace(entry, shape=shape, nbytes=row * (last - first), offset=entry.offset + row * first)


def _rows_together(weight: StoredWeight, suffix: str) -> int | None:
    """Rows of the weight that a row of a part belongs to; None: the part belongs to all of them."""
    assert weight.format is not None
    if suffix in WHOLE or (suffix == "_scale" and weight.format.name == "fp8_tensor"):
        return None
    if suffix == "_zero_point":
        return ZEROS_PER_ROW
    is_scale = suffix in ("_scale", "_scale_inv")
    return weight.block[0] if is_scale and weight.format.name == "fp8" and weight.block else 1
