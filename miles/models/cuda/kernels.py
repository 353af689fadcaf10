"""Batch-invariant product and softmax: one tile for every shape, one order of every sum.

A library splits a long sum over thread blocks when there are few rows, and chooses tiles by shape. Here a
tile walks over K from the front in fixed steps, and a row's softmax adds lane by lane: what is padded with
zeros, or computed beside a row, changes nothing in it. Shapes: B batch, M rows, K inner, N columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M, BLOCK_N, BLOCK_K = 32, 64, 32
LANES = 1024


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """a [B, M, K] @ b [B, K, N] -> [B, M, N] in a's dtype, summed in fp32."""
    batch, rows, inner = a.shape
    columns = b.shape[2]
    out = a.new_empty(batch, rows, columns)
    if out.numel() == 0:
        return out
    grid = (triton.cdiv(rows, BLOCK_M), triton.cdiv(columns, BLOCK_N), batch)
    strides = (*a.stride(), *b.stride(), *out.stride())
    tiles = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K}
    _bmm[grid](a, b, out, rows, columns, inner, *strides, **tiles)
    return out


def softmax(x: Tensor) -> Tensor:
    """Over the last dimension of a contiguous fp32 tensor; -inf where a row's element counts for nothing."""
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    if out.numel() > 0:
        _softmax[(x.numel() // width,)](x, out, width, LANES=LANES)
    return out


@triton.jit
def _bmm(
    a: Any,
    b: Any,
    out: Any,
    rows: Any,
    columns: Any,
    inner: Any,
    a_batch: Any,
    a_row: Any,
    a_inner: Any,
    b_batch: Any,
    b_inner: Any,
    b_column: Any,
    out_batch: Any,
    out_row: Any,
    out_column: Any,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    batch = tl.program_id(2).to(tl.int64)
    a_tile = a + batch * a_batch + m[:, None].to(tl.int64) * a_row + k[None, :] * a_inner
    b_tile = b + batch * b_batch + k[:, None] * b_inner + n[None, :].to(tl.int64) * b_column
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, inner, BLOCK_K):
        left = inner - start
        x = tl.load(a_tile, mask=(m[:, None] < rows) & (k[None, :] < left), other=0.0)
        y = tl.load(b_tile, mask=(k[:, None] < left) & (n[None, :] < columns), other=0.0)
        # TF32 would round fp32 factors.
        total = tl.dot(x, y, total, input_precision="ieee")
        a_tile += BLOCK_K * a_inner
        b_tile += BLOCK_K * b_inner
    place = out + batch * out_batch + m[:, None].to(tl.int64) * out_row + n[None, :] * out_column
    tl.store(place, total.to(out.dtype.element_ty), mask=(m[:, None] < rows) & (n[None, :] < columns))


@triton.jit
def _softmax(x: Any, out: Any, width: Any, LANES: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64) * width
    lanes = tl.arange(0, LANES)
    top = tl.full((LANES,), float("-inf"), dtype=tl.float32)
    for start in range(0, width, LANES):
        values = tl.load(x + row + start + lanes, mask=start + lanes < width, other=float("-inf"))
        top = tl.maximum(top, values)
    highest = tl.max(top, axis=0)
    total = tl.zeros((LANES,), dtype=tl.float32)
    for start in range(0, width, LANES):
        values = tl.load(x + row + start + lanes, mask=start + lanes < width, other=float("-inf"))
        total += tl.exp(values - highest)
    whole = tl.sum(total, axis=0)
    for start in range(0, width, LANES):
        inside = start + lanes < width
        values = tl.load(x + row + start + lanes, mask=inside, other=float("-inf"))
        tl.store(out + row + start + lanes, tl.exp(values - highest) / whole, mask=inside)
