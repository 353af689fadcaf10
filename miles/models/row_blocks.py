"""Matrix products cut into blocks of rows, so that a library is asked only for row counts known to agree.

A matrix library chooses its kernel, and with it the order of a sum, by the number of rows. `RowBlocks` lists
counts at which a row was measured to get the same bits (`invariance`); any other number of rows is cut into
such blocks and the last one filled up. Backward is one product: bit-equality is a promise about
the forward pass. Shapes: T rows, K inputs, N outputs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from miles.models.invariant import mm
from miles.models.narrow import product


@dataclass(frozen=True)
class RowBlocks:
    """How the products with one shape of matrix are computed.

    Attributes:
        sizes: row counts at which a row gets the same bits, ascending.
        dtype: of the product; wider than the operands where their own has no such counts.
        batched: those of `sizes` at which a batched product of several matrices gives a row the same bits;
            none where that was not tried.
    """

    sizes: tuple[int, ...]
    dtype: torch.dtype
    batched: tuple[int, ...] = ()

    def __str__(self) -> str:
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(self.dtype, str(self.dtype))
        return f"blocks of {self.sizes[0]} to {self.sizes[-1]} in {dtype}"

    @cached_property
    def alone(self) -> frozenset[int]:
        """Numbers of rows that one product computes without filling up."""
        return frozenset(self.sizes)

    def batched_rows(self, rows: int) -> int | None:
        """The fewest rows of a batched product that hold `rows` of each matrix."""
        at = bisect_left(self.batched, max(rows, 1))
        return self.batched[at] if at < len(self.batched) else None

    def cut(self, rows: int) -> list[int]:
        """Block sizes that hold `rows`: whole largest blocks, then the smallest that holds the rest."""
        most = self.sizes[-1]
        blocks = [most] * (rows // most)
        rest = rows % most
        return [*blocks, self.sizes[bisect_left(self.sizes, rest)]] if rest else blocks


def blocked_product(x: Tensor, weight: Tensor, blocks: RowBlocks) -> Tensor:
    """x [T, K] @ weight [N, K]ᵀ -> [T, N] in x's dtype, rounded once, without autograd."""
    if blocks.dtype != x.dtype:
        return _cut_product(x.to(blocks.dtype), weight.to(blocks.dtype).t(), blocks).to(weight.dtype)
    if x.shape[0] in blocks.alone:
        return mm(x, weight.t())
    return _cut_product(x, weight.t(), blocks)


def _cut_product(x: Tensor, matrix: Tensor, blocks: RowBlocks) -> Tensor:
    """x [T, K] @ matrix [K, N] block by block; only what the last block takes is filled up."""
    rows, sizes = x.shape[0], blocks.cut(x.shape[0])
    if not sizes:
        return x.new_zeros(0, matrix.shape[1])
    start = sum(sizes[:-1])
    last = x[start:] if start else x
    last = mm(filled_up(last, sizes[-1]) if sizes[-1] > rows - start else last, matrix)
    if not start:
        return last[:rows]
    out = x.new_empty(rows, matrix.shape[1])
    products(x[:start], [matrix] * len(sizes[:-1]), sizes[:-1], out[:start])
    out[start:] = last[: rows - start]
    return out


def filled_up(x: Tensor, rows: int) -> Tensor:
    """x [T, …] and behind it rows that nobody reads -> [rows, …]; copying its own first is the quickest."""
    missing = rows - x.shape[0]
    if missing > x.shape[0]:
        return torch.cat((x, x.new_zeros(missing, *x.shape[1:])))
    return torch.cat((x, x[:missing]))


def products(
    x: Tensor, matrices: Sequence[Tensor], sizes: Sequence[int], out: Tensor | None = None
) -> Tensor:
    """Consecutive blocks of x [sum(sizes), K], each times its matrix [K, N] -> [sum(sizes), N]."""
    if len(sizes) == 1:
        return mm(x, matrices[0], out)
    if out is None:
        out = x.new_empty(x.shape[0], matrices[0].shape[1] if matrices else 0)
    for block, matrix, place in zip(x.split(sizes), matrices, out.split(sizes), strict=True):
        mm(block, matrix, out=place)
    return out


def blocked_linear(x: Tensor, weight: Tensor, blocks: RowBlocks) -> Tensor:
    """`blocked_product` with gradients."""
    if torch.is_grad_enabled():
        return _BlockedLinear.apply(x, weight, blocks)
    return blocked_product(x, weight, blocks)


class _BlockedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, blocks: RowBlocks) -> Tensor:
        ctx.save_for_backward(x, weight)
        return blocked_product(x, weight, blocks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_x = product(grad, weight) if ctx.needs_input_grad[0] else None
        grad_weight = product(grad.t(), x) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None
