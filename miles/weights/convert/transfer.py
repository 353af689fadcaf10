"""One group of weights from the source into its file, and back from there to be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miles.arch.safetensors_header import TensorEntry
from miles.arch.stored_forms import FP8_BLOCK
from miles.arch.stored_weights import StoredWeight
from miles.precision.weight_format import PLAIN, published, quantised, shared_scale
from miles.weights.convert.errors import RoundTrip, check_equal, checked_cast
from miles.weights.convert.moves import Move
from miles.weights.convert.reader import Reader, SafetensorsReader
from miles.weights.convert.shard_file import ShardFile
from miles.weights.convert.shards import Group
from miles.weights.convert.stored import as_numbers
from miles.weights.convert.strips import rows_of, strips, uncut
from miles.weights.safetensors_io import DTYPES
from miles.weights.stacked_experts import stacked

Outcome = dict[str, Any]
"""What became of a weight, as the manifest says it."""


@dataclass(frozen=True)
class Transfer:
    """Reads from `source`, writes into shard files, reads them again through `written`."""

    source: Reader
    written: SafetensorsReader
    fresh: Callable[[str], Tensor]
    """Weights that the source lacks, by name."""
    verify: bool = True

    def run(self, group: Group, file: ShardFile) -> dict[str, Outcome]:
        """Move a group; what became of each weight, by name.

        Raises MilesError naming the weight that cannot be stored in its format, or CheckpointError where the
        disk gives back something else than was written.
        """
        if len(group) == 1 and group[0].how in ("copied", "cast"):
            one = group[0]
            found = self._copy(one, file) if one.how == "copied" else self._cast(one, file)
            return {one.name: outcome(one) | found}
        if group[0].weight.pieces:
            return {one.name: outcome(one) | self._stack(one, file) for one in group}
        target = group[0].target
        assert target is not None
        every = (self._strip(one, begin, end) for one in group for begin, end in self._strips(one.weight))
        shared = shared_scale(target, every)
        return {one.name: outcome(one) | self._in_strips(one, file, shared) for one in group}

    def _in_strips(self, one: Move, file: ShardFile, shared: Tensor | None) -> Outcome:
        held = StoredWeight(one.name, one.weight.shape, one.target, file.entries(one), FP8_BLOCK)
        error = RoundTrip()
        for begin, end in self._strips(one.weight):
            exact, place = self._strip(one, begin, end), rows_of(held, begin, end)
            for name, tensor in _stored(one, exact, shared).items():
                file.write(name, place.parts[name].offset - held.parts[name].offset, tensor)
            if self.verify:
                parts = {name: self.written.read(entry) for name, entry in place.parts.items()}
                error.add(exact, as_numbers(place, parts, torch.float32))
        return error.as_dict() if self.verify else {}

    def _stack(self, one: Move, file: ShardFile) -> Outcome:
        (held,) = file.entries(one).values()
        error, dtype = RoundTrip(), DTYPES[held.dtype]
        for cut, piece in one.weight.pieces:
            for begin, end in self._strips(piece):
                exact, place = self._read(rows_of(piece, begin, end)), cut.rows(begin, end)
                file.write_columns(held, place, checked_cast(exact, dtype, one.name))
                if self.verify:
                    error.add(exact, self.written.columns(held, place))
        return error.as_dict() if self.verify else {}

    def _strips(self, weight: StoredWeight) -> Iterator[tuple[int, int]]:
        return strips(weight) if self.source.has_rows else iter([uncut(weight)])

    def _strip(self, one: Move, begin: int, end: int) -> Tensor:
        if not one.weight.parts:
            whole = self.fresh(one.name)
            return whole[begin:end] if whole.ndim else whole
        return self._read(rows_of(one.weight, begin, end))

    def _copy(self, one: Move, file: ShardFile) -> Outcome:
        held_entries = file.entries(one)
        for name, entry in zip(one.forms, one.weight.parts.values(), strict=True):
            at, held = 0, held_entries[name]
            back = self.written.pieces(held)
            for piece in self.source.pieces(entry):
                at = file.write(name, at, piece)
                if self.verify:
                    check_equal(_raw(piece), _raw(next(back)), name, str(file.path))
        return {"relative_error": 0.0, "max_error": 0.0} if self.verify else {}

    def _cast(self, one: Move, file: ShardFile) -> Outcome:
        (entry,), (held,) = one.weight.parts.values(), file.entries(one).values()
        error, at, dtype = RoundTrip(), 0, DTYPES[held.dtype]
        for piece in self.source.pieces(entry):
            end = file.write(held.name, at, checked_cast(piece, dtype, one.name))
            if self.verify:
                error.add(piece, self.written.piece(held, at, end - at))
            at = end
        return error.as_dict() if self.verify else {}

    def numbers(self, one: Move) -> Tensor:
        """A weight before it is rounded: as it is where it is plain, fp32 where it is dequantised."""
        return self._read(one.weight) if one.weight.parts else self.fresh(one.name)

    def _read(self, weight: StoredWeight) -> Tensor:
        if weight.pieces:
            return stacked(weight.shape, ((cut, self._read(piece)) for cut, piece in weight.pieces))
        if weight.cut is not None:
            (entry,) = weight.parts.values()
            return self.source.columns(entry, weight.cut)
        parts = {name: self.source.read(entry) for name, entry in weight.parts.items()}
        if weight.format is None or weight.format.is_plain:
            (numbers,) = parts.values()
            return numbers
        return as_numbers(weight, parts, torch.float32)

    def compared(self, exact: Tensor, held: TensorEntry) -> Outcome:
        """The error of plain numbers on the disk."""
        error, flat = RoundTrip(), exact.reshape(-1)
        begin = 0
        for piece in self.written.pieces(held):
            error.add(flat[begin : begin + piece.numel()], piece)
            begin += piece.numel()
        return error.as_dict()


def _stored(one: Move, exact: Tensor, shared: Tensor | None) -> dict[str, Tensor]:
    """What is written of numbers in the format of the target, by published name."""
    assert one.target is not None
    if one.target.is_plain:
        return {one.name: checked_cast(exact, PLAIN[one.target.name], one.name)}
    tensors = published(one.name, quantised(one.target, exact, shared))
    # A strip's own shape is not that of the matrix.
    shape = {name: torch.tensor(one.weight.shape) for name in tensors if name.endswith("_shape")}
    return tensors | shape


def outcome(one: Move) -> Outcome:
    """What the plan says of a weight."""
    before = "random" if one.how == "new" else str(one.weight.format or "as it is")
    told = {"how": one.how, "from": before, "to": str(one.target or "as it is")}
    return told | ({"why": one.why} if one.why else {})


def _raw(piece: Tensor) -> Tensor:
    return piece.view(torch.uint8)
