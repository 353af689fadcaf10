"""Attention to the keys that an indexer chooses (DeepSeek sparse attention, https://arxiv.org/abs/2512.02556).

All scores are made and those of other keys masked: right for any attention, quick for none. Rows of the cache
hold the keys of attention, which are its values as well, and behind them those of the indexer.

Shapes: B sequences, H heads, Q queries, S rows of a sequence, d head width, w row width, h heads of the
indexer, e their width.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from miles.arch.spec import AttentionSpec, IndexerSpec

QUERY_BLOCK = 512
"""Queries whose scores exist at once."""


@runtime_checkable
class SparseAttention(Protocol):
    """An `Attention` that knows which rows a query may choose from."""

    def attend_sparse(
        self, layer: int, q: Tensor, rows: Tensor, index_q: Tensor, index_weights: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """q [T, H, d], rows [T, 1, w], index_q [T, h, e], index_weights [T, h] -> [T, H * d]."""
        ...


def attend_to_chosen(
    q: Tensor, rows: Tensor, mask: Tensor, index_q: Tensor, index_weights: Tensor, spec: AttentionSpec
) -> Tensor:
    """Every query sees the best `top_k` rows of those that the mask leaves.

    Args:
        q: [B, H, Q, d]. rows: [B, S, w]. mask: 0 or -inf, [B or 1, Q, S].
        index_q: [B, h, Q, e]. index_weights: [B, h, Q].

    Returns:
        [B, H, Q, d].
    """
    assert spec.indexer is not None
    keys, index_keys = rows.split((spec.head_dim, spec.indexer.head_dim), -1)
    keys = keys.unsqueeze(1)
    blocks = []
    for start in range(0, q.shape[2], QUERY_BLOCK):
        part = slice(start, start + QUERY_BLOCK)
        index = (index_q[:, :, part], index_keys, index_weights[:, :, part])
        seen = _chosen(*index, mask[:, part], spec.indexer)
        blocks.append(_attended(q[:, :, part], keys, keys, seen))
    return torch.cat(blocks, 2)


def attend_heads_to_chosen(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    index_q: Tensor,
    index_keys: Tensor,
    index_weights: Tensor,
    spec: IndexerSpec,
) -> Tensor:
    """Causal attention to the chosen from position 0 on, where every head has keys and values of its own.
    Several blocks of queries are computed again in backward.

    Args:
        q, keys: [B, H, S, d]. values: [B, H, S, v].
        index_q: [B, h, S, e]. index_keys: [B, S, e]. index_weights: [B, h, S].

    Returns:
        [B, H, S, v].
    """
    several = q.shape[2] > QUERY_BLOCK and torch.is_grad_enabled()
    blocks: list[Tensor] = []
    for start in range(0, q.shape[2], QUERY_BLOCK):
        part, seen = slice(start, start + QUERY_BLOCK), slice(start + QUERY_BLOCK)
        own = q[:, :, part], index_q[:, :, part], index_weights[:, :, part]
        block = (*own, keys[:, :, seen], values[:, :, seen], index_keys[:, seen], spec)
        out = checkpoint(_last_queries, *block, use_reentrant=False) if several else _last_queries(*block)
        blocks.append(out)
    return torch.cat(blocks, 2)


def _last_queries(
    q: Tensor,
    index_q: Tensor,
    index_weights: Tensor,
    keys: Tensor,
    values: Tensor,
    index_keys: Tensor,
    spec: IndexerSpec,
) -> Tensor:
    """Queries at the last positions of as many as there are keys."""
    rows, positions = q.shape[2], keys.shape[2]
    ahead = torch.full((rows, positions), float("-inf"), dtype=q.dtype, device=q.device)
    mask = ahead.triu_(positions - rows + 1).unsqueeze(0)
    return _attended(q, keys, values, _chosen(index_q, index_keys, index_weights, mask, spec))


def _attended(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """q [B, H, Q, d], keys [B, 1 or H, S, d], values [B, 1 or H, S, v], seen 0 or -inf, [B, Q, S]."""
    scores = q @ keys.transpose(2, 3) * q.shape[-1] ** -0.5 + seen.unsqueeze(1)
    return torch.softmax(scores, -1) @ values


@torch.no_grad()
def _chosen(q: Tensor, keys: Tensor, weights: Tensor, mask: Tensor, spec: IndexerSpec) -> Tensor:
    """The mask with all rows but the chosen at -inf, [B, Q, S]; scores in fp32."""
    scores = torch.relu(q.float() @ keys.float().unsqueeze(1).transpose(2, 3)) * spec.head_dim**-0.5
    weights = weights.float().unsqueeze(-1) * spec.num_heads**-0.5
    total = (scores * weights).sum(1) + mask
    kept = total.topk(min(spec.top_k, total.shape[-1]), -1).indices
    dropped = torch.ones_like(total, dtype=torch.bool).scatter_(-1, kept, False)
    return mask.masked_fill(dropped, float("-inf"))
