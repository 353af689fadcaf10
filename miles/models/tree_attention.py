"""Several unread tokens of each cached sequence at once: a chain or a tree of guesses behind its last token.

The nodes of a sequence are its last token (node 0, the root) and guesses of what follows, parents before
children. A node sees the sequence and its own ancestors, so its result is that of plain decoding along its
path. Node j is written to column prefix + j of its slot; in a chain that is its position.

Shapes: T nodes, n sequences in slots 0..n-1, W most nodes of one, H query heads, Hkv key/value heads, G = H /
Hkv, d head width, S key columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.arch.spec import AttentionSpec
from miles.models import visible
from miles.models.attention import KEY_BLOCK
from miles.models.exact_sparse import attend_to_choice
from miles.models.exact_sums import QUERY_STEP, padded_keys, probabilities, scores_of, weighted_values
from miles.models.kv_cache import KVCache
from miles.models.softcap import softcapped
from miles.models.sparse_attention import attend_to_chosen


@dataclass(frozen=True)
class TreeNodes:
    """Where the nodes of one forward hang.

    Attributes:
        slots, nodes: int64 [T], the slot of each node and its number there.
        depths: int64 [T], 0 for roots.
        prefix: int64 [n], positions already cached in each slot, at least 0.
        ancestors: bool [n, W, W], whether node i sees node j (itself included).
        is_chain: every node hangs on the one before it.
    """

    slots: Tensor
    nodes: Tensor
    depths: Tensor
    prefix: Tensor
    ancestors: Tensor
    is_chain: bool

    @cached_property
    def positions(self) -> Tensor:
        """Place of each node in its sequence, int64 [T]."""
        return self.prefix[self.slots] + self.depths

    @cached_property
    def columns(self) -> Tensor:
        """Cache column of each node, int64 [T]."""
        return self.prefix[self.slots] + self.nodes

    @cached_property
    def cells(self) -> Tensor:
        """Place of each node in a grid [n, W] seen flat, int64 [T]."""
        return self.slots * self.ancestors.shape[1] + self.nodes

    @property
    def num_columns(self) -> int:
        """Columns that some node may see."""
        return int(self.prefix.max()) + self.ancestors.shape[1]

    def mask(self, num_keys: int, dtype: torch.dtype, spec: AttentionSpec | None = None) -> Tensor:
        """[n, W, num_keys]: 0 where a node sees a column, -inf elsewhere. `spec`: how far a node sees."""
        n, width, _ = self.ancestors.shape
        steps = torch.arange(num_keys, device=self.prefix.device)
        seen = (steps < self.prefix.unsqueeze(1)).unsqueeze(1).repeat(1, width, 1)
        own = (self.prefix.unsqueeze(1) + steps[:width]).unsqueeze(1).expand(n, width, width)
        seen.scatter_(2, own, self.ancestors)
        if spec is not None and not spec.is_plain:
            # A node's depth is the number of its ancestors.
            positions = self.prefix.unsqueeze(1) + self.ancestors.sum(-1) - 1
            of_columns = steps.repeat(n, 1).scatter(1, own[:, 0], positions)
            seen &= visible.seen(spec, positions.unsqueeze(2), of_columns.unsqueeze(1))
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


class TreeAttention:
    """The nodes of every slot together, against the slot's columns."""

    _attend_to_chosen = staticmethod(attend_to_chosen)

    def __init__(self, cache: KVCache, nodes: TreeNodes) -> None:
        assert nodes.num_columns <= cache.max_len, "the guesses outgrow their cache slot"
        self._cache, self._nodes = cache, nodes
        self.num_keys = min(-(-nodes.num_columns // KEY_BLOCK) * KEY_BLOCK, cache.max_len)
        self._rows = cache.rows(nodes.slots, nodes.columns)
        self._masks: dict[tuple[int | None, int | None], Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        self._cache.write(layer, self._rows, k, v)
        queries, keys, values = self._grids(layer, q, spec)
        scores = softcapped(torch.bmm(queries, keys.transpose(1, 2)), spec.softcap)
        n, width, _ = self._nodes.ancestors.shape
        by_node = scores.view(n, spec.num_heads, width, self.num_keys)
        by_node.add_(self._mask(q.dtype, spec).unsqueeze(1))
        return self._flatten(torch.bmm(torch.softmax(scores, -1), values), spec)

    def _mask(self, dtype: torch.dtype, spec: AttentionSpec) -> Tensor:
        """Of the nodes in layers that see as far as this one [n, W, S]."""
        if spec.extent not in self._masks:
            self._masks[spec.extent] = self._nodes.mask(self.num_keys, dtype, spec)
        return self._masks[spec.extent]

    def attend_sparse(
        self, layer: int, q: Tensor, rows: Tensor, index_q: Tensor, index_weights: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """See `sparse_attention.SparseAttention`."""
        self._cache.write(layer, self._rows, rows, rows)
        n, width, _ = self._nodes.ancestors.shape
        mask = self._nodes.mask(self.num_keys, q.dtype)
        held = self._cache.keys[layer, :n, 0, : self.num_keys]

        def grid(x: Tensor) -> Tensor:
            """[T, H, d] -> [n, H, W, d]."""
            laid = x.new_zeros(n * width, *x.shape[1:]).index_copy_(0, self._nodes.cells, x)
            return laid.view(n, width, *x.shape[1:]).transpose(1, 2)

        weights = grid(index_weights.unsqueeze(-1)).squeeze(-1)
        out = self._attend_to_chosen(grid(q), held, mask, grid(index_q), weights, spec)
        return out.transpose(1, 2).reshape(n * width, -1).index_select(0, self._nodes.cells)

    def _grids(self, layer: int, q: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled queries [n * Hkv, G * W, d], keys and values [n * Hkv, S, d]."""
        n, width, _ = self._nodes.ancestors.shape
        grid = q.new_zeros(n * width, spec.num_heads, spec.head_dim)
        grid.index_copy_(0, self._nodes.cells, q * spec.head_dim**-0.5)
        queries = grid.view(n, width, spec.num_heads, spec.head_dim).transpose(1, 2)
        keys = self._cache.keys[layer, :n, :, : self.num_keys].flatten(0, 1).to(q.dtype)
        values = self._cache.values[layer, :n, :, : self.num_keys].flatten(0, 1).to(q.dtype)
        return queries.reshape(n * spec.num_kv_heads, -1, spec.head_dim), keys, values

    def _flatten(self, out: Tensor, spec: AttentionSpec) -> Tensor:
        """[n * Hkv, G * W, d] -> [T, H * d]."""
        n, width, _ = self._nodes.ancestors.shape
        grid = out.reshape(n, spec.num_heads, width, spec.head_dim).transpose(1, 2)
        return grid.reshape(n * width, spec.query_width).index_select(0, self._nodes.cells)


class ExactChainAttention(TreeAttention):
    """`TreeAttention` of chains with the bits of `ExactCachedAttention`, position by position.

    A chain's columns are its positions, so each node's keys stand where a plain decode has them.
    """

    _attend_to_chosen = staticmethod(attend_to_choice)

    def __init__(self, cache: KVCache, nodes: TreeNodes) -> None:
        assert nodes.is_chain
        super().__init__(cache, nodes)
        self.num_keys = padded_keys(nodes.num_columns)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        self._cache.write(layer, self._rows, k, v)
        queries, keys, values = (x.float() for x in self._grids(layer, q.float(), spec))
        rows = queries.shape[1]
        # As the packed side does: query rows come in whole steps.
        missing = -rows % QUERY_STEP
        groups = spec.num_heads // spec.num_kv_heads
        mask = F.pad(self._mask(torch.float32, spec).repeat(1, groups, 1), (0, 0, 0, missing))
        mask = mask.repeat_interleave(spec.num_kv_heads, 0)
        scores = scores_of(F.pad(queries, (0, 0, 0, missing)), keys, spec.softcap)
        p = probabilities(scores, 0, mask)
        return self._flatten(weighted_values(p, values)[:, :rows], spec).to(q.dtype)


class ExactTreeAttention:
    """Trees with the bits of `ExactCachedAttention`: every node gets the keys of its path laid out as a plain
    sequence, since the place of a key in a sum changes its rounding. Costs a copy of the keys per node.
    """

    def __init__(self, cache: KVCache, nodes: TreeNodes, min_queries: int) -> None:
        assert nodes.num_columns <= cache.max_len, "the guesses outgrow their cache slot"
        self._cache, self._min_queries = cache, min_queries
        self._rows = cache.rows(nodes.slots, nodes.columns)
        self._num_keys = padded_keys(int(nodes.positions.max()) + 1)
        self._path_rows = self._rows_of_paths(nodes)
        self._positions = nodes.positions
        self._masks: dict[tuple[int | None, int | None], Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        cache, num_nodes, groups = self._cache, q.shape[0], spec.num_heads // spec.num_kv_heads
        cache.write(layer, self._rows, k, v)
        shape = (num_nodes * spec.num_kv_heads, self._num_keys, spec.head_dim)
        keys, values = (
            side[layer].view(-1, spec.head_dim).index_select(0, self._path_rows).view(shape).float()
            for side in (cache.keys, cache.values)
        )
        queries = q.float() * spec.head_dim**-0.5
        queries = queries.view(num_nodes * spec.num_kv_heads, groups, spec.head_dim)
        queries = F.pad(queries, (0, 0, 0, max(0, self._min_queries - groups)))
        mask = self._mask(spec).repeat_interleave(spec.num_kv_heads, 0)
        out = weighted_values(probabilities(scores_of(queries, keys, spec.softcap), 0, mask), values)
        return out[:, :groups].reshape(num_nodes, spec.query_width).to(q.dtype)

    def attend_sparse(
        self, layer: int, q: Tensor, rows: Tensor, index_q: Tensor, index_weights: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """See `sparse_attention.SparseAttention`."""
        cache = self._cache
        cache.write(layer, self._rows, rows, rows)
        held = cache.keys[layer].view(-1, spec.cache_dim).index_select(0, self._path_rows)
        held = held.view(len(q), self._num_keys, -1)
        queries, index, weights = (x.unsqueeze(2) for x in (q, index_q, index_weights))
        least = self._min_queries
        return attend_to_choice(queries, held, self._mask(spec), index, weights, spec, least).flatten(1)

    def _mask(self, spec: AttentionSpec) -> Tensor:
        """[T, 1, S] of keys in the order of positions."""
        if spec.extent not in self._masks:
            keys = torch.arange(self._num_keys, device=self._positions.device)
            mask = visible.additive_mask(spec, self._positions.unsqueeze(1), keys)
            self._masks[spec.extent] = mask.unsqueeze(1)
        return self._masks[spec.extent]

    def _rows_of_paths(self, nodes: TreeNodes) -> Tensor:
        """Cache rows of position 0, 1, … of every node's path, head by head: int64 [T * Hkv * S]."""
        columns = torch.arange(self._num_keys, device=nodes.slots.device).repeat(len(nodes.slots), 1)
        seen = nodes.ancestors[nodes.slots, nodes.nodes]
        width = seen.shape[1]
        # An ancestor's depth is the number of ancestors before it, since parents come first.
        depth = seen.cumsum(1) - 1
        prefix = nodes.prefix[nodes.slots].unsqueeze(1)
        positions = torch.where(seen, prefix + depth, self._num_keys)
        padded = F.pad(columns, (0, 1))
        padded.scatter_(1, positions, prefix + torch.arange(width, device=seen.device))
        heads = nodes.slots.unsqueeze(1) * self._cache.num_kv_heads + torch.arange(
            self._cache.num_kv_heads, device=seen.device
        )
        columns = padded[:, :-1].clamp(max=self._cache.max_len - 1)
        return (heads.unsqueeze(2) * self._cache.max_len + columns.unsqueeze(1)).flatten()
