"""Attention in which the bits of a token's result depend on its own sequence only: decoded one by one or
packed, whatever else is in the batch, whatever width the keys are padded to.

One formula on both sides, softmax(q kᵀ · scale + mask) v (scores may be soft-capped), with every sum taken in
one order:

- products, softmax and sums are in fp32 for any operands, and the result is rounded once: the kernels for
  narrower numbers vary more, with the batch and with the width;
- keys come in whole steps (`padded_keys`); a masked key has probability 0 and adds an exact 0;
- the product with the values is summed block by block of `KEY_BLOCK` keys, in order: a matrix library splits
  one long sum differently for different lengths;
- a product has at least `min_queries` rows: for fewer, libraries take other kernels;
- keys before a window or chunk are masked as those behind are, or left out in whole steps (`first_key`), so
  that the others keep their places in every sum.

torch's scaled_dot_product_attention has none of these properties. Shapes: N sequences, H query heads, Hkv
key/value heads, G = H / Hkv, d head width, B batch of (sequence, key head), M query rows, S padded keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.arch.spec import AttentionSpec
from miles.models.attention import chunk_rows, prompt_rows
from miles.models.exact_sparse import Index, attend_to_choice
from miles.models.exact_sums import (
    KEY_BLOCK,
    QUERY_STEP,
    first_key,
    padded_keys,
    probabilities,
    scores_of,
    weighted_blocks,
    weighted_values,
)
from miles.models.invariant import softmax
from miles.models.kv_cache import KVCache
from miles.models.softcap import softcap_slope
from miles.models.token_grid import TokenGrid
from miles.models.visible import additive_mask

QUERY_BLOCK = 128
SCORE_ELEMENTS = 1 << 20
"""Scores held at once: 4 MiB in fp32, held by a cache until their last use."""


class ExactCachedAttention:
    """`CachedAttention` with the bits of `ExactPackedAttention`. The cache holds `padded_keys` positions.

    A product that needs more rows than a key head has queries also reads those of the next key heads, whose
    results nobody reads: that costs no copy, and softmax is spared the rows.
    """

    def __init__(self, cache: KVCache, lengths: Tensor, min_queries: int) -> None:
        self._cache = cache
        self.num_sequences = lengths.numel()
        self.num_keys = padded_keys(int(lengths.max()) + 1)
        assert self.num_keys <= cache.max_len, "a sequence outgrew its cache slot"
        self._min_queries = min_queries
        slots = torch.arange(self.num_sequences, device=lengths.device)
        self._rows = cache.rows(slots, lengths)
        self._positions = lengths
        self._seen: dict[tuple[int | None, int | None], tuple[int, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        cache, n, groups = self._cache, self.num_sequences, spec.num_heads // spec.num_kv_heads
        cache.write(layer, self._rows, k, v)
        first, mask = self._keys_seen(spec)
        work = self._workspace(groups, first)
        keys, values = work.held(cache, layer)
        torch.mul(q.float(), spec.head_dim**-0.5, out=work.queries)
        scores = scores_of(work.queries_read, keys, spec.softcap)
        torch.add(scores.view(work.scores_shape)[:, :, :groups], mask, out=work.p)
        softmax(work.p, out=work.p)
        out = weighted_blocks(work.p_read, values)
        return out[:, :groups].reshape(n, spec.query_width).to(q.dtype)

    def attend_sparse(
        self, layer: int, q: Tensor, rows: Tensor, index_q: Tensor, index_weights: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """See `sparse_attention.SparseAttention`."""
        cache = self._cache
        cache.write(layer, self._rows, rows, rows)
        held = cache.keys[layer, : self.num_sequences, 0, : self.num_keys]
        mask = self._keys_seen(spec)[1][:, 0]
        queries, index, weights = (x.unsqueeze(2) for x in (q, index_q, index_weights))
        return attend_to_choice(queries, held, mask, index, weights, spec, self._min_queries).flatten(1)

    def _keys_seen(self, spec: AttentionSpec) -> tuple[int, Tensor]:
        """The first key that is read, and the mask [n, 1, 1, keys] of those from it on."""
        if spec.extent not in self._seen:
            first = 0
            if spec.extent != (None, None):
                first = first_key(spec, int(self._positions.min()), self._positions.device)
            keys = torch.arange(first, self.num_keys, device=self._positions.device)
            mask = additive_mask(spec, self._positions.unsqueeze(1), keys)
            self._seen[spec.extent] = first, mask[:, None, None]
        return self._seen[spec.extent]

    def _workspace(self, groups: int, first: int) -> _Workspace:
        """All layers use the same, and the next steps as long as it fits."""
        rows = (self.num_sequences, self._cache.num_kv_heads, groups)
        key = rows, slice(first, self.num_keys), self._min_queries

        def make() -> _Workspace:
            return _Workspace(*key, self._cache.head_dim, self._positions.device)

        return self._cache.workspace(key, make)


class _Workspace:
    """Queries and probabilities of one step over keys `seen`, and views of a cache that many steps share.

    Both are fp32 rows of G queries for each of B = n * Hkv products, written through `queries` [n, H, d] and
    `p` [n, Hkv, G, keys], and read as [B, M, width], M = max(G, least): the rows of a product and the next
    ones; behind the last stand zeros. `p_read`: in blocks of keys.
    """

    def __init__(
        self, shape: tuple[int, int, int], seen: slice, least: int, width: int, device: torch.device
    ) -> None:
        n, kv_heads, groups = shape
        self._num_sequences, self._seen = n, seen
        num_keys, height = seen.stop - seen.start, max(groups, least)
        queries, self.queries_read = _overlapping_rows(shape, width, height, device)
        self.queries = queries.view(n, kv_heads * groups, width)
        self.p, p_read = _overlapping_rows(shape, num_keys, height, device)
        self.p_read = p_read.split(KEY_BLOCK, 2)
        self.scores_shape = (n, kv_heads, height, num_keys)
        self._held: dict[int, tuple[Tensor, tuple[Tensor, ...]]] = {}

    def held(self, cache: KVCache, layer: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Keys [B, keys, d] and blocks of values of a layer in fp32."""
        if layer in self._held:
            return self._held[layer]
        keys, values = (
            side[layer, : self._num_sequences, :, self._seen].flatten(0, 1)
            for side in (cache.keys, cache.values)
        )
        held = keys.float(), values.float().split(KEY_BLOCK, 1)
        if keys.dtype == torch.float32:
            # Views: what the cache holds later is seen through them.
            self._held[layer] = held
        return held


def _overlapping_rows(
    shape: tuple[int, int, int], width: int, height: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Memory [n, Hkv, G, width], and the same with M = `height` rows of each product [n * Hkv, M, width]."""
    n, kv_heads, groups = shape
    rows = n * kv_heads * groups
    held = torch.empty(rows + height - groups, width, device=device)
    held[rows:].zero_()
    read = held.as_strided((n * kv_heads, height, width), (groups * width, width, 1))
    return held[:rows].view(*shape, width), read


class ExactChunkAttention:
    """`ChunkAttention` with the bits of `ExactPackedAttention`. The cache holds `padded_keys` positions."""

    def __init__(self, cache: KVCache, slot: int, start: int, num_tokens: int) -> None:
        self._cache, self._slot, self._start, self._stop = cache, slot, start, start + num_tokens
        assert padded_keys(self._stop) <= cache.max_len, "a sequence outgrew its cache slot"
        self._rows = chunk_rows(cache, slot, start, self._stop)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        self._cache.write(layer, self._rows, k, v)
        queries = q.float() * spec.head_dim**-0.5
        blocks = [
            self._block(layer, queries, start, min(start + QUERY_BLOCK, self._stop), spec)
            for start in range(self._start, self._stop, QUERY_BLOCK)
        ]
        return torch.cat(blocks).to(q.dtype)

    def attend_sparse(
        self, layer: int, q: Tensor, rows: Tensor, index_q: Tensor, index_weights: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """See `sparse_attention.SparseAttention`."""
        cache, first = self._cache, self._start
        cache.write(layer, self._rows, rows, rows)
        blocks = []
        for start in range(first, self._stop, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, self._stop)
            positions = torch.arange(padded_keys(stop), device=q.device)
            mask = additive_mask(spec, positions[start:stop].unsqueeze(1), positions)
            held = cache.keys[layer, self._slot, 0, : len(positions)]
            queries, index = (x[start - first : stop - first].transpose(0, 1) for x in (q, index_q))
            weights = index_weights[start - first : stop - first].t()
            out = attend_to_choice(queries[None], held[None], mask[None], index[None], weights[None], spec)
            blocks.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(blocks)

    def _block(self, layer: int, queries: Tensor, start: int, stop: int, spec: AttentionSpec) -> Tensor:
        """Queries at positions start..stop-1 of the chunk's queries [T, H, d] -> [stop - start, H * d]."""
        kv_heads, height = self._cache.num_kv_heads, stop - start
        seen = slice(first_key(spec, start, queries.device), padded_keys(stop))
        rows = -(-height // QUERY_STEP) * QUERY_STEP
        part = queries[start - self._start : stop - self._start].transpose(0, 1)
        part = F.pad(part, (0, 0, 0, rows - height)).reshape(kv_heads, -1, queries.shape[2])
        positions = torch.arange(seen.start, max(start + rows, seen.stop), device=queries.device)
        at, keys_at = positions[start - seen.start :][:rows], positions[: seen.stop - seen.start]
        # Rows past the end may see nothing at all: they are nobody's.
        mask = additive_mask(spec, at.unsqueeze(1), keys_at).repeat(part.shape[1] // rows, 1)
        keys, values = (x[layer, self._slot, :, seen].float() for x in (self._cache.keys, self._cache.values))
        out = weighted_values(probabilities(scores_of(part, keys, spec.softcap), 0, mask), values)
        return out.view(queries.shape[1], rows, -1)[:, :height].transpose(0, 1).flatten(1)


class ExactPackedAttention:
    """`PackedAttention` with the bits of `ExactCachedAttention`, in memory linear in the length.

    Queries go block by block, the sequences that reach so far together (the longest first).
    """

    def __init__(self, cu_seqlens: Tensor, cache: KVCache | None = None, slots: Tensor | None = None) -> None:
        self._grid = TokenGrid(cu_seqlens, longest_first=True)
        self._lengths = self._grid.lengths.tolist()
        self._masks: dict[tuple[int, int, int], Tensor] = {}
        self._cache = cache
        if cache is not None:
            self._cache_rows = prompt_rows(cache, slots, self._grid)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        if self._cache is not None:
            self._cache.write(layer, self._cache_rows, k, v)
        return self._attend(q, k, v, spec, None)

    def attend_sparse(
        self, layer: int, q: Tensor, rows: Tensor, index_q: Tensor, index_weights: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """See `sparse_attention.SparseAttention`."""
        if self._cache is not None:
            self._cache.write(layer, self._cache_rows, rows, rows)
        assert spec.indexer is not None
        keys, index_keys = rows.split((spec.head_dim, spec.indexer.head_dim), -1)
        index = Index(
            self._of_queries(index_q),
            self._of_keys(index_keys).squeeze(1),
            self._of_queries(index_weights.unsqueeze(-1)).squeeze(-1),
        )
        return self._attend(q, keys, keys, spec, index)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, index: Index | None) -> Tensor:
        queries = self._of_queries(q.float() * spec.head_dim**-0.5)
        out = _CausalBlocks.apply(queries, self._of_keys(k), self._of_keys(v), self, spec, index)
        return self._grid.flatten(out).to(q.dtype)

    def _of_queries(self, x: Tensor) -> Tensor:
        """x [T, H, d] of tokens that ask -> fp32 [N, H, L, d], L a whole number of steps."""
        return self._grid.lay_out(x.float(), -(-self._lengths[0] // QUERY_STEP) * QUERY_STEP)

    def _of_keys(self, x: Tensor) -> Tensor:
        """x [T, H, d] of tokens that are seen -> fp32 [N, H, S, d]."""
        return self._grid.lay_out(x.float(), padded_keys(self._lengths[0]))

    def blocks(self, q: Tensor, k: Tensor, spec: AttentionSpec, index: Index | None) -> Iterator[_Block]:
        """The query blocks of grids q [N, H, L, d] and k [N, Hkv, S, d]."""
        num_queries, kv_heads = q.shape[2], k.shape[1]
        groups = q.shape[1] // kv_heads
        held = len(self._lengths) * q.shape[1] * k.shape[2]
        height = min(QUERY_BLOCK, max(1, SCORE_ELEMENTS // held // QUERY_STEP) * QUERY_STEP)
        for start in range(0, num_queries, height):
            stop = min(start + height, num_queries)
            keys = min(padded_keys(stop), k.shape[2])
            reaching = sum(length > start for length in self._lengths)
            if index is not None:
                assert spec.indexer is not None
                mask = self._mask(q, 1, stop - start, keys - start)
                mask = F.pad(mask, (start, 0)).unsqueeze(0)
                part = index.part(reaching, slice(start, stop), keys)
                chosen = part.choice(mask, spec.indexer).repeat(1, groups, 1)
                yield _Block(slice(start, stop), slice(0, keys), reaching, 0, chosen)
                continue
            if spec.extent == (None, None):
                mask = self._mask(q, groups, stop - start, keys - start)
                yield _Block(slice(start, stop), slice(0, keys), reaching, start, mask)
                continue
            first = first_key(spec, start, q.device)
            positions = torch.arange(first, max(keys, stop), device=q.device)
            queries = positions[start - first : stop - first].unsqueeze(1)
            mask = additive_mask(spec, queries, positions[: keys - first]).repeat(groups, 1)
            yield _Block(slice(start, stop), slice(first, keys), reaching, 0, mask)

    def _mask(self, q: Tensor, groups: int, height: int, width: int) -> Tensor:
        """Causal mask of a block over the keys from its first query on: [G * height, width]."""
        if (groups, height, width) not in self._masks:
            above = torch.full((height, width), float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
            self._masks[groups, height, width] = above.repeat(groups, 1)
        return self._masks[groups, height, width]


@dataclass(frozen=True)
class _Block:
    """Some queries of the first `reaching` sequences, against some keys, with a mask of those from number
    `masked_from` of them on."""

    rows: slice
    keys: slice
    reaching: int
    masked_from: int
    mask: Tensor

    def queries(self, grid: Tensor, kv_heads: int) -> Tensor:
        """[N, H, L, d] -> [B, G * height, d], a copy."""
        part = grid[: self.reaching, :, self.rows]
        return part.reshape(self.reaching * kv_heads, -1, grid.shape[3])

    def seen(self, grid: Tensor) -> Tensor:
        """[N, Hkv, S, d] -> [B, keys, d], a view."""
        return grid[: self.reaching, :, self.keys].flatten(0, 1)

    def put(self, grid: Tensor, rows: Tensor) -> None:
        """Write [B, G * height, d] back to where `queries` took it."""
        part = grid[: self.reaching, :, self.rows]
        part.copy_(rows.view(part.shape))

    def add(self, grid: Tensor, rows: Tensor) -> None:
        """Add [B, keys, d] to where `seen` took it."""
        part = grid[: self.reaching, :, self.keys]
        part += rows.view(part.shape)


class _CausalBlocks(torch.autograd.Function):
    """Keeps q, k and v; backward computes the probabilities again, unless there is one block only."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: ExactPackedAttention,
        spec: AttentionSpec,
        index: Index | None,
    ) -> Tensor:
        out, p, count = torch.zeros_like(q), None, 0
        for block in plan.blocks(q, k, spec, index):
            scores = scores_of(block.queries(q, k.shape[1]), block.seen(k), spec.softcap)
            p = probabilities(scores, block.masked_from, block.mask)
            block.put(out, weighted_values(p, block.seen(v)))
            count += 1
        ctx.save_for_backward(q, k, v, p if count == 1 else None)
        ctx.plan, ctx.spec, ctx.index = plan, spec, index
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, only = ctx.saved_tensors
        kv_heads, cap = k.shape[1], ctx.spec.softcap
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
        for block in ctx.plan.blocks(q, k, ctx.spec, ctx.index):
            q_BMd, grad_BMd = block.queries(q, kv_heads), block.queries(grad, kv_heads)
            k_BSd, v_BSd = block.seen(k), block.seen(v)
            p, slope = only, None
            if p is None or cap is not None:
                scores = scores_of(q_BMd, k_BSd, cap)
                slope = None if cap is None else softcap_slope(scores, cap)
                p = probabilities(scores, block.masked_from, block.mask) if p is None else p
            grad_p = torch.bmm(grad_BMd, v_BSd.transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
            if slope is not None:
                grad_scores.mul_(slope)
            block.put(grad_q, torch.bmm(grad_scores, k_BSd))
            block.add(grad_k, torch.bmm(grad_scores.transpose(1, 2), q_BMd))
            block.add(grad_v, torch.bmm(p.transpose(1, 2), grad_BMd))
        return grad_q, grad_k, grad_v, None, None, None
