"""How far the numbers that were written are from those that were read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from miles.errors import CheckpointError

_STRIP = 1 << 19
"""Numbers compared at a time."""


class RoundTrip:
    """||written - read|| / ||read|| and max|written - read| over all pieces of a weight."""

    def __init__(self) -> None:
        self._off = self._all = self._worst = 0.0

    def add(self, read: Tensor, written: Tensor) -> None:
        """Two equally long pieces of any float dtypes, compared in fp32 and summed in fp64."""
        left, right = read.reshape(-1), written.reshape(-1)
        for begin in range(0, left.numel(), _STRIP):
            exact = left[begin : begin + _STRIP].float()
            # A copy, where the numbers are fp32 already: they are written or compared once more.
            difference = torch.sub(right[begin : begin + _STRIP].float(), exact)
            self._off += float(difference.square().sum(dtype=torch.float64))
            self._all += float(exact.square().sum(dtype=torch.float64))
            self._worst = max(self._worst, float(difference.abs().amax()))

    @property
    def relative(self) -> float:
        """0 for weights that are all 0 and stay so."""
        return math.sqrt(self._off / self._all) if self._all else math.sqrt(self._off)

    def as_dict(self) -> dict[str, float]:
        return {"relative_error": self.relative, "max_error": self._worst}


def checked_cast(piece: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Numbers in another plain format. Raises CheckpointError where one would become an infinity."""
    cast = piece.to(dtype)
    if dtype == torch.float16 and piece.dtype != torch.float16:
        lost = int((cast.isinf() & piece.isfinite()).sum())
        if lost:
            raise CheckpointError(
                f"{name} has {lost} numbers beyond fp16's largest, 65504",
                why="they would become infinities",
                fix="convert to bf16",
            )
    return cast


def check_equal(read: Tensor, written: Tensor, name: str, where: str) -> None:
    """Raise CheckpointError where bytes on the disk are not those that were written."""
    if not torch.equal(read, written):
        raise CheckpointError(
            f"{name} reads back differently from what was written",
            where=where,
            why="the disk or the memory is at fault",
            fix="choose another disk, and run the command again",
        )
