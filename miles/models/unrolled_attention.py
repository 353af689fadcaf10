"""Attention of a draft that is taught to guess on from its own guesses, over whole sequences at once.

A draft that has read rows 0..t writes row t + 1 from its own features, then t + 2, and so on. Its guess j
steps behind row t sees the true rows up to t and its own j rows, not those of other starting points. So in
pass j every row t is a chain of its own: the keys of pass 0 up to t, and one key of each pass from 1 to j
(training-time test, https://arxiv.org/abs/2503.01840). Chains do not see each other, so only those that are
taught something need to go on.

Shapes: T rows, R rows that go on, n sequences with such rows, C most of them in one, L longest sequence, H
query heads, Hkv key heads, G = H / Hkv, d head width, B queries of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from miles.arch.spec import AttentionSpec
from miles.errors import RunError
from miles.models.attention import Attention
from miles.models.sparse_attention import SparseAttention
from miles.models.token_grid import TokenGrid

QUERY_BLOCK = 128


class UnrolledAttention:
    """For a layer, the first call is `first`'s attention; each further one is a guess that goes on from it,
    of all rows or of those that `go_on` named last.

    Scores are materialised for a block of queries at a time; several blocks are computed again in backward.
    """

    def __init__(self, first: Attention, cu_seqlens: Tensor) -> None:
        self._first, self._grid = first, TokenGrid(cu_seqlens)
        self._longest = int(self._grid.lengths.max())
        self._true: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._rows = torch.arange(self._grid.sequence_of_token.numel(), device=cu_seqlens.device)

    def go_on(self, rows: Tensor) -> Tensor:
        """Only these rows (int64 [R], ascending, not empty, among those that went on so far) take part in the
        calls to come. Returns their places among the rows so far.
        """
        places = torch.searchsorted(self._rows, rows)
        self._rows = rows
        for layer, passes in self._own.items():
            self._own[layer] = [(k[places], v[places]) for k, v in passes]
        return places

    def attend_sparse(
        self, layer: int, q: Tensor, rows: Tensor, index_q: Tensor, index_weights: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """See `sparse_attention.SparseAttention`; the first call of a layer only."""
        if layer in self._true or not isinstance(self._first, SparseAttention):
            raise RunError(
                "an MTP layer with sparse attention is not taught to go on from its own guesses",
                fix="set --mtp-training-steps to the number of MTP layers",
            )
        self._true[layer], self._own[layer] = (rows, rows), []
        return self._first.attend_sparse(layer, q, rows, index_q, index_weights, spec)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        if layer not in self._true:
            self._true[layer], self._own[layer] = (k, v), []
            return self._first.attend(layer, q, k, v, spec)
        self._own[layer].append((k, v))
        sequences, counts = self._grid.sequence_of_token[self._rows].unique_consecutive(return_counts=True)
        chains = TokenGrid(F.pad(counts.cumsum(0), (1, 0)))
        width = int(counts.max())
        places = self._grid.position_of_token[self._rows].view(-1, 1, 1)
        positions = chains.lay_out(places, width).view(-1, width)
        queries = chains.lay_out(q * spec.head_dim**-0.5, width)
        keys, values = (self._grid.lay_out(x, self._longest)[sequences] for x in self._true[layer])
        own_keys, own_values = (
            _lay_out(chains, torch.stack(side, 1), width) for side in zip(*self._own[layer], strict=True)
        )
        several = width > QUERY_BLOCK and torch.is_grad_enabled()
        blocks: list[Tensor] = []
        for start in range(0, width, QUERY_BLOCK):
            block = slice(start, start + QUERY_BLOCK)
            seen = int(positions[:, block].max()) + 1
            parts = (
                *(queries[:, :, block], keys[:, :, :seen], values[:, :, :seen]),
                *(own_keys[:, :, block], own_values[:, :, block], positions[:, block]),
            )
            blocks.append(checkpoint(_chains, *parts, use_reentrant=False) if several else _chains(*parts))
        return chains.flatten(torch.cat(blocks, 2))


def _lay_out(grid: TokenGrid, x: Tensor, width: int) -> Tensor:
    """[R, j, Hkv, d] -> [n, Hkv, C, j, d]."""
    steps, heads = x.shape[1:3]
    laid = grid.lay_out(x.flatten(1, 2), width)
    return laid.view(laid.shape[0], steps, heads, *laid.shape[2:]).permute(0, 2, 3, 1, 4)


def _chains(
    q: Tensor, keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor, positions: Tensor
) -> Tensor:
    """Queries q [n, H, B, d] at `positions` [n, B] of their sequences, keys [n, Hkv, S, d] from position 0
    on, own_keys [n, Hkv, B, j, d] -> [n, H, B, d].
    """
    kv_heads, seen = keys.shape[1:3]
    q = q.unflatten(1, (kv_heads, -1))
    ahead = torch.arange(seen, device=q.device) > positions.unsqueeze(2)
    to_true = torch.einsum("nhgbd,nhsd->nhgbs", q, keys)
    to_true = to_true.masked_fill(ahead[:, None, None], float("-inf"))
    to_own = torch.einsum("nhgbd,nhbjd->nhgbj", q, own_keys)
    p_true, p_own = torch.softmax(torch.cat((to_true, to_own), -1), -1).split((seen, own_keys.shape[3]), -1)
    out = torch.einsum("nhgbs,nhsd->nhgbd", p_true, values)
    out = out + torch.einsum("nhgbj,nhbjd->nhgbd", p_own, own_values)
    return out.flatten(1, 2)
