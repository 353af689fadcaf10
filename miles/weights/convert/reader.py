"""Reading tensors of a checkpoint into memory of our own, piece by piece.

Files are read, not mapped: one that is cut short meanwhile is an error message, not a bus error.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from miles.arch.expert_layout import Cut
from miles.arch.safetensors_header import TensorEntry
from miles.errors import CheckpointError
from miles.weights.safetensors_io import DTYPES

PIECE_BYTES = 1 << 23
"""Bytes that are in memory at a time where a tensor is copied or cast number by number."""


class Reader(Protocol):
    """Where the tensors of a source come from. Used by several threads at once."""

    has_rows: bool
    """Whether some rows of a tensor are read like a tensor: its entry, with another place and shape."""

    def read(self, entry: TensorEntry) -> Tensor:
        """A whole tensor."""

    def columns(self, entry: TensorEntry, cut: Cut) -> Tensor:
        """A matrix out of a stacked tensor."""

    def pieces(self, entry: TensorEntry) -> Iterator[Tensor]:
        """The numbers of a tensor in order, flat, a few MB at a time."""

    def close(self) -> None:
        """Nothing is read any more."""


class SafetensorsReader:
    """Tensors where their headers say they are. Implements `Reader`."""

    has_rows = True

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, entry: TensorEntry) -> Tensor:
        return self._read(entry, entry.offset, entry.nbytes).view(entry.shape)

    def columns(self, entry: TensorEntry, cut: Cut) -> Tensor:
        whole = torch.empty(entry.shape[1], cut.last - cut.first, dtype=DTYPES[entry.dtype])
        descriptor = self._descriptor(entry.file)
        for row, offset in zip(rows_of_bytes(whole), offsets(entry, cut), strict=True):
            if not _fill(descriptor, offset, row):
                raise _cut_short(entry)
        return whole.mT.contiguous()

    def pieces(self, entry: TensorEntry) -> Iterator[Tensor]:
        for begin in range(0, entry.nbytes, PIECE_BYTES):
            yield self.piece(entry, begin, min(PIECE_BYTES, entry.nbytes - begin))

    def piece(self, entry: TensorEntry, begin: int, nbytes: int) -> Tensor:
        """The numbers in some of a tensor's bytes, flat."""
        return self._read(entry, entry.offset + begin, nbytes)

    def close(self) -> None:
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def forget(self, path: Path) -> None:
        """Nothing is read from this file any more."""
        with self._lock:
            descriptor = self._files.pop(path, None)
        if descriptor is not None:
            os.close(descriptor)

    def _read(self, entry: TensorEntry, offset: int, nbytes: int) -> Tensor:
        raw = torch.empty(nbytes, dtype=torch.uint8)
        if not read_into(self._descriptor(entry.file), offset, raw):
            raise _cut_short(entry)
        return raw.view(DTYPES[entry.dtype])

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY)
            return self._files[path]


def offsets(entry: TensorEntry, cut: Cut) -> range:
    """Where in its file each of the D runs of numbers begins that a matrix takes of a stacked tensor."""
    _, rows, outputs = entry.shape
    size = DTYPES[entry.dtype].itemsize
    begin = entry.offset + (cut.expert * rows * outputs + cut.first) * size
    return range(begin, begin + rows * outputs * size, outputs * size)


def _cut_short(entry: TensorEntry) -> CheckpointError:
    return CheckpointError(
        f"the file ends inside {entry.name}: it was cut short while it was read",
        where=str(entry.file),
        fix="copy or download the file again",
    )


def read_into(descriptor: int, offset: int, raw: Tensor) -> bool:
    """Fill a uint8 tensor from a file; False where the file ends before."""
    return _fill(descriptor, offset, memoryview(raw.numpy()))


def _fill(descriptor: int, offset: int, view: memoryview) -> bool:
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            return False
        view, offset = view[count:], offset + count
    return True


def write_all(descriptor: int, offset: int, raw: Tensor) -> None:
    """Write a uint8 tensor at a place of a file."""
    put(descriptor, offset, memoryview(raw.numpy()))


def put(descriptor: int, offset: int, view: memoryview) -> None:
    """Write bytes at a place of a file."""
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def rows_of_bytes(matrix: Tensor) -> Iterator[memoryview]:
    """The bytes of each row of a contiguous matrix, which may be written to."""
    whole = memoryview(bytes_of(matrix).numpy())
    size = matrix.shape[1] * matrix.element_size()
    return (whole[begin : begin + size] for begin in range(0, len(whole), size))


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in order, flat uint8; a view where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
