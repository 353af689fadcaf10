"""Attention in which a token does not see all that is before it, or whose scores are soft-capped.

Shapes: N sequences, H query heads, Hkv key/value heads, G = H / Hkv, d head width, Q queries, S keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from miles.arch.spec import AttentionSpec
from miles.models.softcap import softcapped

QUERY_BLOCK = 256
"""Queries that attend at once: in a window of W tokens they see W + QUERY_BLOCK - 1 keys at most."""


def seen(spec: AttentionSpec, queries: Tensor, keys: Tensor) -> Tensor:
    """bool: whether a query at one position sees a key at another. int64 positions, broadcast together."""
    visible = keys <= queries
    if spec.window is not None:
        visible = visible & (queries - keys < spec.window)
    if spec.chunk is not None:
        visible = visible & (queries // spec.chunk == keys // spec.chunk)
    return visible


def additive_mask(spec: AttentionSpec, queries: Tensor, keys: Tensor) -> Tensor:
    """fp32: 0 where a query sees a key, -inf elsewhere; positions as in `seen`."""
    visible = seen(spec, queries, keys)
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, float("-inf"))


def first_seen(spec: AttentionSpec, position: int) -> int:
    """The first position that a query at `position` sees."""
    in_window = 0 if spec.window is None else max(0, position - spec.window + 1)
    return in_window if spec.chunk is None else max(in_window, position // spec.chunk * spec.chunk)


def attend_visible(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, spec: AttentionSpec) -> Tensor:
    """q [N, H, Q, d], k, v [N, Hkv, S, d], mask bool, broadcast to [N, 1, Q, S] -> [N, H, Q, d]."""
    if spec.softcap is None:
        out: Tensor = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        return out
    grouped = q.unflatten(1, (spec.num_kv_heads, -1)) * spec.head_dim**-0.5
    scores = softcapped(grouped @ k.unsqueeze(2).transpose(3, 4), spec.softcap)
    # [N, Hkv, G, Q, S]
    probabilities = torch.softmax(scores.float().masked_fill(~mask.unsqueeze(1), float("-inf")), -1)
    return (probabilities.to(v.dtype) @ v.unsqueeze(2)).flatten(1, 2)


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """Sequences from their first token on: q [N, H, L, d], k, v [N, Hkv, L, d] -> [N, H, L, d].

    Queries go in blocks, against the keys that they may see; several blocks are computed again in backward.
    """
    length = q.shape[2]
    several = length > QUERY_BLOCK and torch.is_grad_enabled()
    positions = torch.arange(length, device=q.device)
    blocks: list[Tensor] = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        first = first_seen(spec, start)
        mask = seen(spec, positions[start:stop, None], positions[first:stop])
        parts = (q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], mask[None, None], spec)
        blocks.append(
            checkpoint(attend_visible, *parts, use_reentrant=False) if several else attend_visible(*parts)
        )
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)
