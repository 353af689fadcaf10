"""Attention to the keys that an indexer chooses, with the bits of `exact_attention`: a token chooses the same
keys and weighs them alike, decoded or packed.

The scores of the indexer are products in fp32 as those of attention are, and its heads are added one by one.
Of keys that score alike, as all do that no head likes, the earliest are chosen; a library's top-k takes any.

Shapes: B sequences, H heads, Q queries, S keys, d head width, w row width, h heads of the indexer, e their
width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.arch.spec import AttentionSpec, IndexerSpec
from miles.models.exact_sums import QUERY_STEP, weighted_values
from miles.models.invariant import bmm, softmax


@dataclass(frozen=True)
class Index:
    """What the indexer says of some sequences, in fp32: queries [B, h, Q, e], keys [B, S, e], weights
    [B, h, Q]."""

    queries: Tensor
    keys: Tensor
    weights: Tensor

    def part(self, count: int, queries: slice, num_keys: int) -> Index:
        """Some queries of the first `count` sequences, and their first keys."""
        return Index(
            self.queries[:count, :, queries], self.keys[:count, :num_keys], self.weights[:count, :, queries]
        )

    @torch.no_grad()
    def choice(self, mask: Tensor, spec: IndexerSpec, least: int = 1) -> Tensor:
        """Mask [B or 1, Q, S] of 0 and -inf, with all keys but the best `top_k` at -inf too: [B, Q, S].

        `least`: fewest rows of a product.
        """
        batch, heads, num_queries, width = self.queries.shape
        scores = _product(self.queries.reshape(batch, -1, width), self.keys.transpose(1, 2), least)
        scores = torch.relu_(scores).mul_(width**-0.5).view(batch, heads, num_queries, -1)
        weights = (self.weights * heads**-0.5).unsqueeze(-1)
        total = scores[:, 0] * weights[:, 0]
        for head in range(1, heads):
            total += scores[:, head] * weights[:, head]
        total += mask
        return mask.masked_fill(~_best(total, spec.top_k), float("-inf"))


def attend_to_choice(
    q: Tensor,
    rows: Tensor,
    mask: Tensor,
    index_q: Tensor,
    index_weights: Tensor,
    spec: AttentionSpec,
    least: int | None = None,
) -> Tensor:
    """`sparse_attention.attend_to_chosen` with the bits of exact attention, without autograd.

    `least`: of one query for each sequence, fewest rows of a product; None: queries are filled up to whole
    steps.
    """
    assert spec.indexer is not None
    num_queries = q.shape[2]
    if least is None:
        missing = -num_queries % QUERY_STEP
        q, index_q, mask = (F.pad(x, (0, 0, 0, missing)) for x in (q, index_q, mask))
        index_weights = F.pad(index_weights, (0, missing))
    batch, heads, height, d = q.shape
    keys, index_keys = (
        part.float().contiguous() for part in rows.split((spec.head_dim, spec.indexer.head_dim), -1)
    )
    index = Index(index_q.float(), index_keys, index_weights.float())
    chosen = index.choice(mask.float(), spec.indexer, least or 1)
    queries = (q.float() * spec.head_dim**-0.5).reshape(batch, -1, d)
    scores = _product(queries, keys.transpose(1, 2), least or 1).view(batch, heads, height, -1)
    p = softmax(scores + chosen.unsqueeze(1)).view(batch, heads * height, -1)
    out = weighted_values(_filled(p, least or 1), keys)[:, : heads * height]
    return out.reshape(q.shape)[:, :, :num_queries].to(q.dtype)


def _best(total: Tensor, top_k: int) -> Tensor:
    """bool: whether a number is among the `top_k` highest of its row; of equal ones the first are."""
    count = min(top_k, total.shape[-1])
    lowest = total.topk(count, -1).values[..., -1:]
    above, equal = total > lowest, total == lowest
    return above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def _product(a: Tensor, b: Tensor, least: int) -> Tensor:
    """a [B, M, K] @ b [B, K, N] in at least `least` rows."""
    return bmm(_filled(a, least), b)[:, : a.shape[1]].contiguous()


def _filled(a: Tensor, least: int) -> Tensor:
    return F.pad(a, (0, 0, 0, least - a.shape[1])) if a.shape[1] < least else a
