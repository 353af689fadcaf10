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
        ends: int32 [E], the row behind each group.
        cut: groups are computed in blocks of these sizes, each (expert, rows). None: each group at once.
        width: rows of every group where all have as many, to be computed by one batched product.
    """

    tokens: Tensor
    place: Tensor
    ends: Tensor
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
    width = blocks.batched_rows(int(counts.max(initial=0))) if multiply_adds else None
    added = 0 if width is None else num_experts * width - len(expert)
    if width is not None and added * multiply_adds <= num_experts * CALL_MULTIPLY_ADDS:
        return _laid_out(ids, expert, counts, np.full(num_experts, width), width=width)
    cuts = [blocks.cut(count) for count in counts.tolist()]
    cut = [(expert, size) for expert, sizes in enumerate(cuts) for size in sizes]
    return _laid_out(ids, expert, counts, np.array([sum(sizes) for sizes in cuts]), cut=cut)


def _laid_out(
    ids: Tensor,
    expert: np.ndarray,
    counts: np.ndarray,
    filled: np.ndarray,
    cut: list[tuple[int, int]] | None = None,
    width: int | None = None,
) -> ExpertRows:
    """The `counts` [E] pairs of each expert at the start of `filled` [E] rows; `expert` [R] of each pair."""
    # Numbers of 16 bits are sorted by radix, seven times faster.
    order = expert.astype(np.int16).argsort(kind="stable")
    ends = filled.cumsum()
    # A group moves by the rows with which those before it were filled up.
    at = (ends - filled - counts.cumsum() + counts).repeat(counts)
    at += np.arange(len(expert))
    tokens = np.zeros(int(ends[-1]), np.int64)
    tokens[at] = order // ids.shape[1]
    place = np.empty_like(order)
    place[order] = at
    made = [torch.from_numpy(x) for x in (tokens, place, ends.astype(np.int32))]
    if ids.device.type != "cpu":
        made = [x.to(ids.device) for x in made]
    return ExpertRows(made[0], made[1], made[2], cut, width)
