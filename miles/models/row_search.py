"""Finds row counts at which this machine's matrix library gives a row the same bits, wherever the row lies.

The rule is empirical: libraries choose kernels by shape, thread count and processor. So every count that a
run may ask for is measured, on the shapes that it will use, and no other count is ever asked for
(`row_blocks`).

On ordinary numbers two orders of summation often round to the same bits, in bf16 nearly always. So half of
the probe's rows are `cancelling`: their products add up to 0, and what is left is the rounding itself.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from miles.errors import PreflightRefused
from miles.models.expert_rows import CALL_MULTIPLY_ADDS
from miles.models.invariant import bmm
from miles.models.narrow import is_slow
from miles.models.row_blocks import RowBlocks, products

MOST_ROWS, LEAST_MOST = 1024, 64
"""Largest block, and the largest of a matrix so big that the probe would take too long with more."""
LEAST_LARGEST = 16
"""Smaller blocks are always possible, and slower than wider numbers."""
MULTIPLY_ADDS = 1 << 32
"""Budget of the probe of one matrix shape."""
ELEMENTS, FEWEST_ROWS = 4096, 64
"""Results compared per count: of few, some agree by chance."""
COUNTS = (1, 4, 16, 48, 100, 256, 512, 1024, 4096)
"""Rows of a call, few of a decode step and many of a micro-batch, over which choices are compared."""
MOST_BATCHED_ROWS, BATCHED_MATRICES = 256, 8
"""Of the experts of a layer, computed by one batched product."""
CALL_ROWS = 24
"""What one call costs beside its rows, in rows."""


Matrices = tuple[tuple[int, int], ...]
"""Shapes [outputs, inputs] of matrices that are multiplied with the same rows, or with rows of one layout."""


BY_COLUMN: Literal["by column"] = "by column"
Kind = tuple[Matrices, torch.dtype] | tuple[Matrices, torch.dtype, Literal["by column"]]
"""Products that are computed alike. `BY_COLUMN`: the matrices are stored column after column."""


class ProbedBlocks(dict[Kind, RowBlocks]):
    """The blocks for each kind of matrix on one device; a kind is probed when first asked for.

    Every probe draws the same numbers, so two processes on one machine find the same blocks.

    Raises:
        PreflightRefused: for a kind that has none.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self._device = torch.device(device)

    @torch.inference_mode()
    def __missing__(self, kind: Kind) -> RowBlocks:
        generator = torch.Generator(self._device).manual_seed(0)
        blocks = find_row_blocks(kind[0], kind[1], self._device, generator, BY_COLUMN in kind)
        if blocks is None:
            raise impossible(f"a product with {' and '.join(map(str, kind[0]))} in {kind[1]}")
        self[kind] = blocks
        return blocks


def impossible(what: str) -> PreflightRefused:
    """The refusal of a machine on which an operation has no batch-invariant choice."""
    return PreflightRefused(
        f"exact numerics are not possible on this machine: {what}",
        where="alignment.true_on_policy_mode",
        why=f"with {torch.get_num_threads()} thread(s) a row's bits depend on the rows beside it",
        fix="run with one thread (--threads 1), another --dtype, or without --true-on-policy-mode",
    )


def find_row_blocks(
    shapes: Matrices,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
    by_column: bool = False,
) -> RowBlocks | None:
    """The cheapest blocks that suit all matrices of `shapes`, each [outputs, inputs], stored row by row or by
    column.

    In fp32 where narrower products have none or are slow; None where those have none either.
    """
    own = (torch.float32, dtype) if is_slow(dtype, torch.device(device)) else (dtype, torch.float32)
    for computed in dict.fromkeys(own):
        search = _Search(shapes, dtype, computed, torch.device(device), generator, by_column)
        for sizes in sorted(search.candidates(), key=_cost):
            if search.is_free_of_place(sizes):
                return RowBlocks(sizes, computed, search.batched(sizes))
    return None


def ladder(most: int) -> list[int]:
    """Row counts up to `most`, the finer the fewer rows: filling up costs at most 1/16 beyond 64 rows."""
    steps = [1, 2, *range(4, 65, 4)]
    octave = 64
    while octave < most:
        steps += range(octave + octave // 16, 2 * octave + 1, octave // 16)
        octave *= 2
    return [step for step in steps if step <= most]


def cancelling(
    count: int, width: int, sign: float, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Rows [count, width] whose second half repeats the first, times `sign`, in one shuffled order. The
    product of rows of sign 1 and -1 adds up to 0. Columns differ by powers of two, so that sums of narrow
    numbers are rounded in fp32 too."""
    columns = torch.Generator().manual_seed(width)
    order = torch.randperm(width // 2, generator=columns).to(device)
    scale = torch.exp2(torch.randint(-3, 4, (width // 2,), generator=columns)).to(device)
    half = torch.randn(count, width // 2, generator=generator, device=device) * scale
    rest = half.new_zeros(count, width - 2 * (width // 2))
    return torch.cat((half, sign * half[:, order], rest), 1)


class _Search:
    """The products of all counts with one set of shapes, computed once."""

    def __init__(
        self,
        shapes: Matrices,
        dtype: torch.dtype,
        computed: torch.dtype,
        device: torch.device,
        generator: torch.Generator,
        by_column: bool,
    ) -> None:
        self._by_column = by_column
        self._most = _most_rows(shapes)
        self._sizes = ladder(self._most)
        self._factors = []
        for outputs, inputs in shapes:
            matrix = cancelling(outputs, inputs, 1.0, generator, device)
            rows = cancelling(self._most, inputs, -1.0, generator, device)
            rows[1::2] = torch.randn(rows[1::2].shape, generator=generator, device=device)
            self._factors.append((rows.to(dtype).to(computed), self._stored(matrix.to(dtype).to(computed))))
        fewest = max(FEWEST_ROWS, ELEMENTS // min(outputs for outputs, _ in shapes))
        self._places = {size: self._place(size, fewest, i % 2 == 1) for i, size in enumerate(self._sizes)}
        self._products = {
            size: [_in_blocks(rows[place], matrix, size) for rows, matrix in self._factors]
            for size, place in self._places.items()
        }

    def candidates(self) -> list[tuple[int, ...]]:
        """For powers of two, the counts that agree with blocks of it."""
        found = set()
        for reference in (size for size in self._sizes if size >= LEAST_LARGEST and size & (size - 1) == 0):
            whole = [_in_blocks(rows, matrix, reference) for rows, matrix in self._factors]
            agreeing = tuple(size for size in self._sizes if self._agrees(size, whole))
            if reference in agreeing:
                found.add(agreeing)
        return sorted(found)

    def is_free_of_place(self, sizes: tuple[int, ...]) -> bool:
        """Whether a row gets the same bits at another place of the largest block."""
        for rows, matrix in self._factors:
            there = _in_blocks(rows.roll(7, 0), matrix, sizes[-1])
            if not torch.equal(there.roll(-7, 0), _in_blocks(rows, matrix, sizes[-1])):
                return False
        return True

    def batched(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Those of `sizes` at which a batched product of several matrices agrees with one of each; none where
        the rows of such a product are dear, so that filling them up would not pay."""
        if len(self._factors) == 1 or self._factors[0][1].numel() > CALL_MULTIPLY_ADDS:
            return ()
        return tuple(size for size in sizes if size <= MOST_BATCHED_ROWS and self._agrees_batched(size))

    def _agrees_batched(self, size: int) -> bool:
        for rows, matrix in self._factors:
            each = torch.stack([rows.roll(size * i, 0)[:size] for i in range(BATCHED_MATRICES)])
            matrices = self._stored(torch.stack([matrix.roll(i, 0) for i in range(BATCHED_MATRICES)]))
            matrices = matrices.transpose(1, 2)
            expected = products(each.flatten(0, 1), matrices.unbind(), [size] * BATCHED_MATRICES)
            if not torch.equal(bmm(each, matrices).flatten(0, 1), expected):
                return False
        return True

    def _stored(self, matrices: Tensor) -> Tensor:
        """[..., outputs, inputs] in the order in which the model keeps them."""
        return matrices.mT.contiguous().mT if self._by_column else matrices

    def _place(self, size: int, fewest: int, at_end: bool) -> slice:
        """The rows on which a count is tried: whole blocks, from the first row on or up to the last."""
        held = min(-(-max(size, fewest) // size), self._most // size) * size
        return slice(self._most - held, self._most) if at_end else slice(0, held)

    def _agrees(self, size: int, whole: list[Tensor]) -> bool:
        pairs = zip(self._products[size], whole, strict=True)
        return all(torch.equal(own, expected[self._places[size]]) for own, expected in pairs)


def _most_rows(shapes: Matrices) -> int:
    """The largest block whose probe, some 50 times its rows, is within the budget; a power of two."""
    affordable = MULTIPLY_ADDS // (50 * sum(outputs * inputs for outputs, inputs in shapes))
    return max(LEAST_MOST, 1 << min(MOST_ROWS, max(1, affordable)).bit_length() - 1)


def _in_blocks(rows: Tensor, matrix: Tensor, size: int) -> Tensor:
    """rows [R, K] @ matrix [N, K]ᵀ in blocks of `size`; R may leave a rest, whose rows are taken again."""
    whole = len(rows) // size * size
    out = products(rows[:whole], [matrix.t()] * (whole // size), [size] * (whole // size))
    if whole < len(rows):
        last = products(rows[-size:], [matrix.t()], [size])
        out = torch.cat((out, last[whole - len(rows) :]))
    return out


def _cost(sizes: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
    """Rows computed per row asked for; ties go to more sizes."""
    blocks = RowBlocks(sizes, torch.float32)
    paid = (sum(size + CALL_ROWS for size in blocks.cut(n)) / (n + CALL_ROWS) for n in COUNTS)
    return sum(paid), tuple(-size for size in reversed(sizes))
