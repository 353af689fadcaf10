"""What an engine multiplies under a quantised format: weights held as they are stored, 4 or 8 bits each.

A product takes the numbers that the stored ones stand for: an engine without kernels for a format samples
from the same function as one that has them, up to the order of sums. They are made when the product runs, or
once and kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from miles.arch.precision import NumberFormat
from miles.arch.stored_forms import stored_forms
from miles.precision.fp8_block import BlockFp8
from miles.precision.int4_group import GroupInt4, unpack
from miles.precision.mxfp8 import Mxfp8
from miles.precision.pieces import Run, rounded_activations, runs
from miles.precision.weight_format import Stored, dequantised

_TYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I32": torch.int32,
}
_NOT_HELD = "_shape"
"""Says what the published shape says."""


class HeldOperands:
    """One parameter of the decoder in the tensors of its format. Implements `models.projections.Operands`.

    pieces: rows by published name, in the order in which the parameter [..., N] is made of them.
    keep_expanded: whether the plain numbers, of `dtype`, are kept from one product to the next.
    """

    def __init__(
        self,
        target: NumberFormat,
        pieces: Mapping[str, int],
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        keep_expanded: bool = False,
    ) -> None:
        self.target, self._shape, self._dtype = target, shape, dtype
        self._keep_expanded = keep_expanded
        self._expanded: Tensor | None = None
        self._runs = runs(target, tuple(pieces.values()))
        self._columns = shape[-1]
        self._places: dict[str, dict[str, slice]] = {}
        self._parts: dict[str, Tensor] = {}
        self._allocate(pieces, device)

    def _allocate(self, pieces: Mapping[str, int], device: torch.device) -> None:
        """One tensor of each kind for all pieces, rows after rows, and where each piece lies in it."""
        rows: dict[str, int] = {}
        kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, height in pieces.items():
            self._places[name] = {}
            for part, (code, shape) in stored_forms(self.target, name, (height, self._columns)).items():
                suffix = part.removeprefix(name)
                if suffix != _NOT_HELD:
                    start = rows.get(suffix, 0)
                    rows[suffix] = start + shape[0]
                    self._places[name][suffix] = slice(start, rows[suffix])
                    kinds[suffix] = _TYPES[code], shape[1:]
        for suffix, (dtype, rest) in kinds.items():
            self._parts[suffix] = torch.empty(rows[suffix], *rest, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weights and their scales."""
        return sum(part.nbytes for part in self._parts.values())

    @property
    def dtypes(self) -> frozenset[torch.dtype]:
        """Types of the tensors that are held."""
        return frozenset(part.dtype for part in self._parts.values())

    def store(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Take the published tensors of one of the pieces, which have the forms of `stored_forms`."""
        self._expanded = None
        for suffix, place in self._places[name].items():
            self._parts[suffix][place].copy_(tensors[name + suffix])

    def weight(self, own: Tensor | None) -> Tensor:
        """The numbers that the stored ones stand for."""
        assert own is None, "weights that are held in a quantised format have no plain copy"
        if self._expanded is not None:
            return self._expanded
        expanded = self._expand()
        if self._keep_expanded:
            self._expanded = expanded
        return expanded

    def _expand(self) -> Tensor:
        rounded = [dequantised(self._stored(run), self._dtype) for run in self._runs]
        return (rounded[0] if len(rounded) == 1 else torch.cat(rounded)).view(self._shape)

    def activations(self, x: Tensor) -> Tensor:
        """x [T, N], rounded where the format rounds activations."""
        return rounded_activations(self.target, x)

    def _stored(self, run: Run) -> Stored:
        rows = slice(run.start, run.stop)
        if self.target.name == "fp8":
            return BlockFp8(self._parts[""][rows], self._scales(run), run.block)
        if self.target.name == "mxfp8":
            return Mxfp8(self._parts[""], self._parts["_scale_inv"])
        assert self.target.name == "int4" and self.target.symmetric, self.target
        return GroupInt4(unpack(self._parts["_packed"], self._columns), self._parts["_scale"])

    def _scales(self, run: Run) -> Tensor:
        """Rows of scales, which follow each other run after run."""
        before = sum(_rows_of_blocks(r) for r in self._runs if r.stop <= run.start)
        return self._parts["_scale_inv"][before : before + _rows_of_blocks(run)]


def _rows_of_blocks(run: Run) -> int:
    return -(-(run.stop - run.start) // run.block[0])
