"""The rows of routed experts, laid out by expert.

Shapes: T tokens, k experts per token, E experts, R = T * k pairs of token and slot sorted by expert, P >= R
rows where groups are filled up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from miles.models.row_blocks import RowBlocks

CALL_MULTIPLY_ADDS = 1 << 17
"""What a matrix product costs beside its rows, in multiply-adds of a core (measured: 4 µs)."""


@dataclass(frozen=True)
class ExpertRows:
    """Rows grouped by expert.

    Attributes:
        tokens: int64 [P], the token of each row; a row that fills up a group reads the first token.
        place: int64 [R], the row of each (token, slot).
        ends: int32 [E], the row behind each group; None where all have one `width`.
        cut: groups are computed in blocks of these sizes, each (expert, rows). None: each group at once.
        width: rows of every group where all have as many, to be computed by one batched product.
    """

    tokens: Tensor
    place: Tensor
    ends: Tensor | None
    cut: list[tuple[int, int]] | None = None
    width: int | None = None


def sorted_rows(ids: Tensor, num_experts: int) -> ExpertRows:
    """Groups as long as they are, for ids int64 [T, k]; nothing leaves the device."""
    top_k = ids.shape[1]
    expert, order = ids.flatten().sort(stable=True)
    place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    # bincount would ask the device for the largest id.
    experts = torch.arange(num_experts, device=ids.device)
    ends = torch.searchsorted(expert, experts, right=True, out_int32=True)
    return ExpertRows(order // top_k, place, ends)


def filled_rows(ids: Tensor, num_experts: int, blocks: RowBlocks, multiply_adds: int = 0) -> ExpertRows:
    """Groups filled up to counts of `blocks`, for ids int64 [T, k].

    All groups to one width where one batched product is known to give the same bits and costs less than a
    product per group; otherwise each to blocks of its own, and an empty one stays empty.

    Args:
        multiply_adds: of one row. 0: groups are never batched.
    """
    expert = ids.flatten().cpu().numpy()
    counts = np.bincount(expert, minlength=num_experts)
    each: list[int] = counts.tolist()
    width = blocks.batched_rows(max(each)) if multiply_adds else None
    added = 0 if width is None else num_experts * width - len(expert)
    if width is not None and added * multiply_adds <= num_experts * CALL_MULTIPLY_ADDS:
        starts = np.arange(0, num_experts * width, width)
        tokens, place = _laid_out(ids, expert, counts, starts, num_experts * width)
        return ExpertRows(tokens, place, None, width=width)
    cuts = [blocks.cut(count) for count in each]
    cut = [(expert, size) for expert, sizes in enumerate(cuts) for size in sizes]
    filled = np.array([sum(sizes) for sizes in cuts])
    ends = filled.cumsum()
    tokens, place = _laid_out(ids, expert, counts, ends - filled, int(ends[-1]))
    return ExpertRows(tokens, place, torch.from_numpy(ends.astype(np.int32)).to(ids.device), cut)


def _laid_out(
    ids: Tensor, expert: np.ndarray, counts: np.ndarray, starts: np.ndarray, num_rows: int
) -> tuple[Tensor, Tensor]:
    """`tokens` and `place` where the `counts` [E] pairs of each expert begin at row `starts` [E]; `expert`
    [R] is that of each pair. Decoding does this in every layer, where every call shows."""
    # Numbers of 16 bits are sorted by radix, seven times faster.
    order = expert.astype(np.int16).argsort(kind="stable")
    # A group moves by the rows with which those before it were filled up.
    at = (starts - counts.cumsum() + counts).repeat(counts)
    at += np.arange(len(order))
    tokens = np.zeros(num_rows, np.int64)
    tokens[at] = order // ids.shape[1]
    place = np.empty_like(order)
    place[order] = at
    if ids.device.type == "cpu":
        return torch.from_numpy(tokens), torch.from_numpy(place)
    return torch.from_numpy(tokens).to(ids.device), torch.from_numpy(place).to(ids.device)
