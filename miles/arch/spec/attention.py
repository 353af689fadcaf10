"""Attention: which tokens see which, by what keys and values, and what the cache holds of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from miles.arch.spec.rope import RopeSpec

QkNormOver = Literal["head", "width"]


@dataclass(frozen=True)
class LatentSpec:
    """Multi-head latent attention: queries, keys and values of all heads are projections of low rank
    (https://arxiv.org/abs/2405.04434, section 2.1). A head's query and key have `plain_dim` elements of its
    own and `rotated_dim` rotated ones, whose key all heads share.
    """

    query_rank: int | None
    """None: queries are projected from the hidden state at once."""
    kv_rank: int
    plain_dim: int
    rotated_dim: int
    value_dim: int

    @property
    def query_dim(self) -> int:
        return self.plain_dim + self.rotated_dim

    @property
    def down_widths(self) -> tuple[int, int, int]:
        """Rows of the fused projection from the hidden state: query, key and value, rotated key. With a
        query rank of None the first is 0."""
        return self.query_rank or 0, self.kv_rank, self.rotated_dim


@dataclass(frozen=True)
class IndexerSpec:
    """Sparse attention: a query sees the `top_k` keys that score highest with a small attention of its own,
    sum over heads of weight * relu(q k) (https://arxiv.org/abs/2512.02556, section 2.1). It gets no gradient.
    """

    num_heads: int
    head_dim: int
    top_k: int

    def num_parameters(self, hidden_size: int, query_rank: int) -> int:
        projections = self.num_heads * self.head_dim * query_rank + self.head_dim * hidden_size
        return projections + self.num_heads * hidden_size + 2 * self.head_dim


@dataclass(frozen=True)
class QueryTemperature:
    """Sharper attention far behind: the query at position p is multiplied by
    1 + scale · log(1 + floor((p + 1) / floor)) (https://arxiv.org/abs/2501.19399).
    """

    scale: float
    floor: float


@dataclass(frozen=True)
class AttentionSpec:
    """Grouped-query attention. `qk_norm`: RMSNorm over queries and keys before the rotation.

    A token sees itself and all before it; `window`: itself and the `window` - 1 tokens before it; `chunk`:
    those before it in its own chunk of so many positions.
    `softcap`: scores s become softcap · tanh(s / softcap) (https://arxiv.org/abs/2408.00118).

    With `latent`, this is the attention over latents: one key head, the latent followed by the rotated key,
    whose values are the keys (queries absorb the projection from latent to keys, outputs that to values).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool = True
    qk_norm_over: QkNormOver = "head"
    """What shares one mean square: each head, or all heads of a token together."""
    scale: float | None = None
    """Factor of the scores; None: head_dim ** -0.5."""
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    rotates: bool = True
    """False: no position embedding (NoPE); `rope` is not used."""
    qk_unit: bool = False
    """Queries and keys are divided by their root mean square, behind the rotation."""
    v_unit: bool = False
    """Values are divided by their root mean square."""
    keys_of: int | None = None
    """The layer whose keys and values this one attends to; None: it has its own."""
    temperature: QueryTemperature | None = None
    """Of a layer that does not rotate."""
    latent: LatentSpec | None = None
    indexer: IndexerSpec | None = None
    """Keys of the indexer stand behind the others in a row of the cache."""

    @property
    def cache_dim(self) -> int:
        """Elements of a key head in the cache."""
        return self.head_dim + (self.indexer.head_dim if self.indexer else 0)

    @property
    def cache_width(self) -> int:
        """Numbers that the cache holds of a token."""
        return self.num_kv_heads * self.cache_dim * (1 if self.latent else 2)

    @property
    def kept_width(self) -> int:
        """Numbers of a token that backward keeps: projections, and what attention gives."""
        if self.latent is None:
            return self.qkv_width + self.query_width
        projected = sum(self.latent.down_widths) + self.num_heads * self.latent.query_dim
        return projected + 2 * self.query_width + self.kv_width + self.num_heads * self.latent.value_dim

    @property
    def rotary_width(self) -> int:
        """Elements of a head that are rotated."""
        return self.rope.width or self.head_dim

    @property
    def q_norm_width(self) -> int:
        """Weights of the query norm."""
        return self.head_dim if self.qk_norm_over == "head" else self.query_width

    @property
    def k_norm_width(self) -> int:
        """Weights of the key norm; 0 where there are no keys of its own."""
        if self.keys_of is not None:
            return 0
        return self.head_dim if self.qk_norm_over == "head" else self.kv_width

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """What says how far back a token sees: window and chunk; two of None: all the way."""
        return self.window, self.chunk

    @property
    def is_plain(self) -> bool:
        """Whether every token sees all before it, by scores as they are."""
        return self.extent == (None, None) and self.indexer is None and self.softcap is None

    @property
    def query_factor(self) -> float:
        """What queries are multiplied with, beside head_dim ** -0.5."""
        return 1.0 if self.scale is None else self.scale * self.head_dim**0.5

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        """Rows of the fused query, key and value projection."""
        return self.query_width + 2 * self.own_kv_heads * self.head_dim

    @property
    def own_kv_heads(self) -> int:
        """Key heads that the layer computes."""
        return 0 if self.keys_of is not None else self.num_kv_heads

    def query_parameters(self, hidden_size: int) -> int:
        """Matrices of queries and output."""
        latent = self.latent
        if latent is None:
            return 2 * self.query_width * hidden_size
        rank, width = latent.query_rank, self.num_heads * latent.query_dim
        queries = width * hidden_size if rank is None else rank * (hidden_size + width)
        return queries + self.num_heads * latent.value_dim * hidden_size

    def key_value_parameters(self, hidden_size: int) -> int:
        """Matrices of keys and values."""
        latent = self.latent
        if latent is None:
            return 2 * self.own_kv_heads * self.head_dim * hidden_size
        up = self.num_heads * (latent.plain_dim + latent.value_dim) * latent.kv_rank
        return (latent.kv_rank + latent.rotated_dim) * hidden_size + up

    def num_parameters(self, hidden_size: int) -> int:
        projections = self.query_parameters(hidden_size) + self.key_value_parameters(hidden_size)
        if self.latent is not None:
            rank = self.latent.query_rank or 0
            indexer = self.indexer.num_parameters(hidden_size, rank) if self.indexer else 0
            return projections + rank + self.latent.kv_rank + indexer
        biases = self.qkv_bias * self.qkv_width + self.output_bias * hidden_size
        return projections + biases + self.qk_norm * (self.q_norm_width + self.k_norm_width)
