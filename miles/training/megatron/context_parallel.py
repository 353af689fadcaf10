"""Context parallelism: the sequences of a micro-batch cut over ranks, in Megatron's order.

Every sequence is padded to a multiple of 2 C rows and cut into 2 C chunks; rank r of C takes chunks r and
2 C - 1 - r of it, one early and one late, so that causal attention costs all ranks the same
(`megatron.core.utils.get_batch_on_this_cp_rank`; Transformer Engine expects packed sequences so). No true row
sees padding, which is at the end.

Legend: T rows of the micro-batch, P those with padding, t = P / C those of a rank, R trained rows.
"""

from __future__ import annotations

from math import lcm
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from miles.arch.spec import AttentionSpec
from miles.models.attention import CHUNK_QUERIES
from miles.models.visible import attend_visible, first_seen, seen

PADDING = -1


class ContextSplit:
    """Which rows of a micro-batch each of `size` ranks has.

    Args:
        cu_seqlens: [N + 1] of the micro-batch.
        unit: the rows of a rank come in multiples of this; padding for it is a sequence of its own.
    """

    def __init__(self, cu_seqlens: Tensor, size: int, rank: int, unit: int = 1) -> None:
        self.size, self.rank, self._num_rows = size, rank, int(cu_seqlens[-1])
        lengths = cu_seqlens.long().diff()
        padded = -(-lengths // (2 * size)) * 2 * size
        spare = -int(padded.sum()) % (size * lcm(2, unit))
        if spare:
            lengths, padded = (torch.cat([x, x.new_tensor([n])]) for x, n in ((lengths, 0), (padded, spare)))
        self.cu_seqlens = torch.cat([padded.new_zeros(1), padded.cumsum(0)])
        """int64: where the padded sequences begin among all P rows."""
        sequence_P = torch.repeat_interleave(padded)
        positions_P = torch.arange(len(sequence_P), device=padded.device) - self.cu_seqlens[sequence_P]
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])[sequence_P]
        true_P = positions_P < lengths[sequence_P]
        self._row_of_P = torch.where(true_P, starts + positions_P, PADDING)
        chunk_P = positions_P // (padded // (2 * size))[sequence_P]
        owner_P = torch.minimum(chunk_P, 2 * size - 1 - chunk_P)
        self._places_Ct = owner_P.argsort(stable=True).view(size, -1)
        self._positions_P = positions_P

    def rows_of(self, rank: int) -> Tensor:
        """int64 [t]: rows of the micro-batch, in order; `PADDING` for none."""
        return self._row_of_P[self._places_Ct[rank]]

    @property
    def positions(self) -> Tensor:
        """int64 [t]: where the rows of this rank stand in their sequences."""
        return self._positions_P[self._places_Ct[self.rank]]

    @property
    def gathered(self) -> Tensor:
        """int64 [P]: where each row lies when the rows of all ranks are put one after another."""
        return self._places_Ct.flatten().argsort()

    def own(self, values: Tensor, padding: int = 0) -> Tensor:
        """[T, …] -> [t, …]: the rows of this rank."""
        rows = self.rows_of(self.rank)
        found = values[rows.clamp(min=0)]
        found[rows == PADDING] = padding
        return found

    def places(self, rows_R: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows of the micro-batch: which are on this rank, bool [R], and where those lie among its t."""
        own = self.rows_of(self.rank)
        place_T = own.new_full((self._num_rows,), PADDING)
        place_T[own[own != PADDING]] = torch.nonzero(own != PADDING).squeeze(1)
        places_R = place_T[rows_R]
        mine_R = places_R != PADDING
        return mine_R, places_R[mine_R]

    def whole(self, parts: list[Tensor]) -> Tensor:
        """[t, …] of every rank -> [T, …]."""
        found = parts[0].new_empty(self._num_rows, *parts[0].shape[1:])
        for rank, part in enumerate(parts):
            rows = self.rows_of(rank)
            found[rows[rows != PADDING]] = part[rows != PADDING]
        return found


class SplitAttention:
    """Causal attention of this rank's queries to the keys of all ranks, which are gathered; their gradients
    are summed over the ranks.
    """

    def __init__(self, split: ContextSplit) -> None:
        self._gathered = split.gathered
        starts, rows = split.cu_seqlens[:-1].tolist(), (split.cu_seqlens.diff() // (2 * split.size)).tolist()
        mine = (split.rank, 2 * split.size - 1 - split.rank)
        self._chunks = [(start, i * n, n) for start, n in zip(starts, rows, strict=True) for i in mine]
        """First row of the sequence, first position of the chunk and its rows, in the order of queries."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """q [t, H, d], k, v [t, Hkv, d], rotated -> [t, H * d]."""
        group = parallel_state.get_context_parallel_group()
        pairs = gather_from_sequence_parallel_region(torch.cat((k, v), -1).contiguous(), group=group)
        keys, values = pairs.index_select(0, self._gathered).split(k.shape[-1], -1)
        parts, first_query = [], 0
        for start, position, rows in self._chunks:
            for begin in range(0, rows, CHUNK_QUERIES):
                count = min(CHUNK_QUERIES, rows - begin)
                queries = q.narrow(0, first_query + begin, count)
                parts.append(_attended(queries, keys[start:], values[start:], position + begin, spec))
            first_query += rows
        return torch.cat(parts)


def _attended(q: Tensor, k: Tensor, v: Tensor, position: int, spec: AttentionSpec) -> Tensor:
    """Queries [n, H, d] from `position` of their sequence on, which begins with the first key."""
    first, stop = first_seen(spec, position), position + len(q)
    queries = torch.arange(position, stop, device=q.device)
    mask = seen(spec, queries.unsqueeze(1), torch.arange(first, stop, device=q.device))
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k[first:stop], v[first:stop]))
    out = attend_visible(q, k, v, mask[None, None], spec)
    return out[0].transpose(0, 1).flatten(1)


def joined(own: Tensor, mine_R: Tensor) -> Tensor:
    """[R] on every rank, of which this one brings those of `mine_R` (bool [R]) in order.

    Every rank computes the same loss of all R, so backward takes this rank's part of the gradient and
    exchanges nothing; gradients of parameters are summed over the ranks.
    """
    found: Tensor = _Joined.apply(own, mine_R)
    return found


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, mine_R: Tensor) -> Tensor:
        ctx.save_for_backward(mine_R)
        whole = own.new_zeros(len(mine_R))
        whole[mine_R] = own
        dist.all_reduce(whole, group=parallel_state.get_context_parallel_group())
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mine_R,) = ctx.saved_tensors
        return grad[mine_R], None
