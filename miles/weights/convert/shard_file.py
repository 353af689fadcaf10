"""A file of the target while it is filled, at any place and by several threads."""

from __future__ import annotations

import os
import threading
from math import prod
from pathlib import Path

from torch import Tensor

from miles.arch.expert_layout import Cut
from miles.arch.safetensors_header import TensorEntry
from miles.weights.convert.moves import Move
from miles.weights.convert.reader import bytes_of, offsets, put, rows_of_bytes, write_all
from miles.weights.convert.shards import Shard
from miles.weights.safetensors_io import DTYPES


class ShardFile:
    """`shard` in a directory. It has its full length from the start; what is not written yet reads as 0."""

    def __init__(self, directory: Path, shard: Shard) -> None:
        self.path = directory / shard.file
        self.shard = shard
        self._descriptor: int | None = None
        self._guard = threading.Lock()

    def write(self, name: str, at: int, numbers: Tensor) -> int:
        """Put numbers `at` bytes behind where a tensor begins; return where the next ones go."""
        raw = bytes_of(numbers)
        write_all(self._opened(), self.shard.begins[name] + at, raw)
        return at + raw.numel()

    def write_columns(self, held: TensorEntry, cut: Cut, matrix: Tensor) -> None:
        """Put a matrix where it lies in a stacked tensor."""
        descriptor = self._opened()
        for row, offset in zip(rows_of_bytes(matrix.mT.contiguous()), offsets(held, cut), strict=True):
            put(descriptor, offset, row)

    def entries(self, one: Move) -> dict[str, TensorEntry]:
        """The tensors of a weight as a reader finds them."""
        return {
            name: TensorEntry(
                name, code, shape, self.path, DTYPES[code].itemsize * prod(shape), self.shard.begins[name]
            )
            for name, (code, shape) in one.forms.items()
        }

    def flush(self) -> None:
        """All that was written so far survives a loss of power."""
        with self._guard:
            if self._descriptor is not None:
                os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Flush, and open again only for another write."""
        with self._guard:
            if self._descriptor is not None:
                os.fdatasync(self._descriptor)
                os.close(self._descriptor)
                self._descriptor = None

    def _opened(self) -> int:
        with self._guard:
            if self._descriptor is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
                os.ftruncate(self._descriptor, self.shard.size)
                os.pwrite(self._descriptor, self.shard.header, 0)
            return self._descriptor
