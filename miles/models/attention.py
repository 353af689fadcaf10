"""How the tokens of one forward attend: packed sequences, a chunk of a cached one, or one new token for each
of several cached ones.

Shapes: T tokens, N sequences, L longest sequence, H query heads, Hkv key/value heads, d head width,
S key positions. Inside a layer tokens are flat; each object lays them out as its attention needs.
"""

from __future__ import annotations

from typing import Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.arch.spec import AttentionSpec
from miles.models.kv_cache import KVCache
from miles.models.softcap import softcapped
from miles.models.sparse_attention import attend_to_chosen
from miles.models.token_grid import TokenGrid
from miles.models.visible import attend_blocks, attend_visible, first_seen, seen

EXPLICIT_MAX_LEN = 128
"""Up to this length scores are materialised: on CPU that beats torch's blocked kernel on short sequences."""

KEY_BLOCK = 16
"""Decode reads a whole number of such blocks of keys, so that few distinct shapes occur."""


CHUNK_QUERIES = 512
"""Queries of a chunk that attend at once, so that their mask stays small beside the keys."""


class Attention(Protocol):
    """The attention of one forward pass; the decoder calls `attend` once per layer."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """q [T, H, d], k, v [T, Hkv, d], rotated -> [T, H * d]."""
        ...


class HeadAttention(Attention, Protocol):
    """An attention that also takes heads as they are projected, before norms and rotation."""

    def takes(self, heads: Tensor, spec: AttentionSpec, norm_plus_one: bool) -> bool:
        """Whether `attend_heads` computes a layer of this kind; `norm_plus_one`: see `norm.rms_norm`."""
        ...

    def attend_heads(
        self,
        heads: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        rotation: Tensor,
        eps: float,
        spec: AttentionSpec,
    ) -> Tensor:
        """heads [T, H + 2 Hkv, d] (queries, keys, values) -> [T, H * d]."""
        ...


def has_head_attention(attention: Attention) -> TypeGuard[HeadAttention]:
    """Asked once per layer and pass, where isinstance of a protocol would take longer than a small norm."""
    return hasattr(attention, "attend_heads")


class PackedAttention:
    """Causal attention inside each of N sequences that lie one after another in the flat tokens.

    Args:
        cu_seqlens: [N + 1] whole numbers, sequence n is tokens cu_seqlens[n] : cu_seqlens[n + 1].
        cache, slots: when given, the keys and values of sequence n are also written to slot slots[n],
            from position 0 on.
    """

    def __init__(self, cu_seqlens: Tensor, cache: KVCache | None = None, slots: Tensor | None = None) -> None:
        self.grid = TokenGrid(cu_seqlens)
        self.num_sequences = self.grid.num_sequences
        self.max_len = int(self.grid.lengths.max())
        self._mask: Tensor | None = None
        self._cache = cache
        if cache is not None:
            self._cache_rows = prompt_rows(cache, slots, self.grid)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        if self._cache is not None:
            self._cache.write(layer, self._cache_rows, k, v)
        if self.num_sequences == 1 and self.max_len > EXPLICIT_MAX_LEN and spec.is_plain:
            q_HTd, k_HTd, v_HTd = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q_HTd, k_HTd, v_HTd, is_causal=True, enable_gqa=True)
            return out[0].transpose(0, 1).flatten(1)
        q_grid, k_grid, v_grid = (self.grid.lay_out(x, self.max_len) for x in (q, k, v))
        if not spec.is_plain:
            return self.grid.flatten(attend_blocks(q_grid, k_grid, v_grid, spec))
        if self.max_len <= EXPLICIT_MAX_LEN:
            return self.grid.flatten(self.explicit(q_grid, k_grid, v_grid))
        out = F.scaled_dot_product_attention(q_grid, k_grid, v_grid, is_causal=True, enable_gqa=True)
        return self.grid.flatten(out)

    def attend_sparse(
        self, layer: int, q: Tensor, rows: Tensor, index_q: Tensor, index_weights: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """See `sparse_attention.SparseAttention`."""
        if self._cache is not None:
            self._cache.write(layer, self._cache_rows, rows, rows)
        queries, keys, index, weights = (
            self.grid.lay_out(x, self.max_len) for x in (q, rows, index_q, index_weights.unsqueeze(-1))
        )
        ahead = torch.full((self.max_len, self.max_len), float("-inf"), dtype=q.dtype, device=q.device)
        mask = ahead.triu_(1).unsqueeze(0)
        out = attend_to_chosen(queries, keys.squeeze(1), mask, index, weights.squeeze(-1), spec)
        return self.grid.flatten(out)

    def explicit(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Laid out in the grid, L tokens wide: q [N, H, L, d], k, v [N, Hkv, L, d] -> [N, H, L, d]."""
        batch, d = k.shape[0] * k.shape[1], k.shape[3]
        if self._mask is None:
            causal = torch.full((self.max_len, self.max_len), float("-inf"), dtype=q.dtype, device=q.device)
            self._mask = causal.triu_(1).repeat(q.shape[1] // k.shape[1], 1)
        k, v = k.view(batch, -1, d), v.view(batch, -1, d)
        scores = torch.baddbmm(self._mask, q.view(batch, -1, d), k.transpose(1, 2), alpha=d**-0.5)
        return torch.bmm(torch.softmax(scores, -1), v).view(q.shape)


def prompt_rows(cache: KVCache, slots: Tensor | None, grid: TokenGrid) -> Tensor:
    """Where the keys of packed sequences, given in the order of `slots`, belong in the cache."""
    assert slots is not None, "a cache needs the slot of each sequence"
    return cache.rows(slots[grid.sequence_of_token], grid.position_of_token)


class ChunkAttention:
    """The next T tokens of one sequence, which attend to the `start` positions before them in its cache slot.

    Their keys and values are written to positions start, start + 1, … of the slot.
    """

    def __init__(self, cache: KVCache, slot: int, start: int, num_tokens: int) -> None:
        self._cache, self._slot, self._start, self._stop = cache, slot, start, start + num_tokens
        assert self._stop <= cache.max_len, "a sequence outgrew its cache slot"
        self._rows = chunk_rows(cache, slot, start, self._stop)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        cache, slot = self._cache, self._slot
        cache.write(layer, self._rows, k, v)
        outputs = []
        for start in range(self._start, self._stop, CHUNK_QUERIES):
            stop = min(start + CHUNK_QUERIES, self._stop)
            queries = q[start - self._start : stop - self._start].transpose(0, 1)
            first = first_seen(spec, start)
            held = (x[layer, slot, :, first:stop] for x in (cache.keys, cache.values))
            keys, values = (x.to(q.dtype) for x in held)
            positions = torch.arange(first, stop, device=q.device)
            mask = seen(spec, positions[start - first :, None], positions)
            out = attend_visible(queries[None], keys[None], values[None], mask[None, None], spec)
            outputs.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(outputs)

    def attend_sparse(
        self, layer: int, q: Tensor, rows: Tensor, index_q: Tensor, index_weights: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """See `sparse_attention.SparseAttention`."""
        cache = self._cache
        cache.write(layer, self._rows, rows, rows)
        held = cache.keys[layer, self._slot, 0, : self._stop].unsqueeze(0)
        positions = torch.arange(self._start, self._stop, device=q.device)
        mask = beyond_mask(positions, self._stop, q.dtype).transpose(0, 1)
        queries, index = (x.transpose(0, 1).unsqueeze(0) for x in (q, index_q))
        out = attend_to_chosen(queries, held, mask, index, index_weights.t().unsqueeze(0), spec)
        return out[0].transpose(0, 1).flatten(1)


def chunk_rows(cache: KVCache, slot: int, start: int, stop: int) -> Tensor:
    """Where positions start..stop-1 of one slot live in a layer seen as rows, see `KVCache.rows`."""
    positions = torch.arange(start, stop, device=cache.keys.device)
    return cache.rows(torch.full_like(positions, slot), positions)


class CachedAttention:
    """One new token for each of the first n slots of a cache, attending to all that the slot holds.

    Args:
        lengths: int64 [n], positions already filled in slots 0..n-1: where the new token is written.
        num_keys: positions that are read, more than any of `lengths`; None: the fewest, which waits for the
            device.
    """

    def __init__(self, cache: KVCache, lengths: Tensor, num_keys: int | None = None) -> None:
        self._cache = cache
        self.num_sequences = lengths.numel()
        if num_keys is None:
            filled = int(lengths.max()) + 1
            assert filled <= cache.max_len, "a sequence outgrew its cache slot"
            num_keys = min(-(-filled // KEY_BLOCK) * KEY_BLOCK, cache.max_len)
        self.num_keys = num_keys
        slots = torch.arange(self.num_sequences, device=lengths.device)
        self._rows = cache.rows(slots, lengths)
        self._positions = lengths
        self._masks: dict[tuple[int | None, int | None], Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        cache, n = self._cache, self.num_sequences
        cache.write(layer, self._rows, k, v)
        keys = cache.keys[layer, :n, :, : self.num_keys].flatten(0, 1).to(q.dtype)
        values = cache.values[layer, :n, :, : self.num_keys].flatten(0, 1).to(q.dtype)
        queries = (q * spec.head_dim**-0.5).view(n * spec.num_kv_heads, -1, spec.head_dim)
        scores = softcapped(torch.bmm(queries, keys.transpose(1, 2)), spec.softcap)
        scores.view(n, spec.num_heads, self.num_keys).add_(self._mask(spec))
        return torch.bmm(torch.softmax(scores, -1), values).view(n, spec.query_width)

    def _mask(self, spec: AttentionSpec) -> Tensor:
        """[n, 1, num_keys]: 0 where a new token sees a key, -inf elsewhere."""
        if spec.extent not in self._masks:
            keys = torch.arange(self.num_keys, device=self._positions.device)
            visible = seen(spec, self._positions.unsqueeze(1), keys)
            mask = torch.zeros(visible.shape, dtype=self._cache.keys.dtype, device=visible.device)
            self._masks[spec.extent] = mask.masked_fill_(~visible, float("-inf")).unsqueeze(1)
        return self._masks[spec.extent]

    def attend_sparse(
        self, layer: int, q: Tensor, rows: Tensor, index_q: Tensor, index_weights: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """See `sparse_attention.SparseAttention`."""
        cache = self._cache
        cache.write(layer, self._rows, rows, rows)
        held = cache.keys[layer, : self.num_sequences, 0, : self.num_keys]
        queries, index, weights = (x.unsqueeze(2) for x in (q, index_q, index_weights))
        return attend_to_chosen(queries, held, self._mask(spec), index, weights, spec).flatten(1)


def beyond_mask(positions: Tensor, num_keys: int, dtype: torch.dtype) -> Tensor:
    """[n, 1, num_keys]: 0 up to each row's own position (int64 [n]), -inf beyond."""
    beyond = torch.arange(num_keys, device=positions.device) > positions.unsqueeze(1)
    mask = torch.zeros(beyond.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(beyond, float("-inf")).unsqueeze(1)
