"""Multi-head latent attention in absorbed form (https://arxiv.org/abs/2405.04434, section 2.1.2).

Keys and values of a token are one latent vector and one rotated key that all heads share. The projection from
the latent to a head's key is applied to its query instead, that to its value to what it gets: attention runs
over one key head, the latent and the rotated key, and the cache holds nothing else.

Shapes: T tokens, D hidden, H heads, p plain and r rotated elements of a head, L rank of keys and values, R
rank of queries, v value width; h heads of the indexer, e their width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miles.arch.spec import AttentionSpec
from miles.errors import RunError
from miles.models.attention import Attention
from miles.models.norm import rms_norm
from miles.models.projections import Projections
from miles.models.recompute import RecomputedModule, again, once
from miles.models.sparse_attention import SparseAttention

EPS = 1e-6
"""Of the norms of latents, whatever the model's."""


class LatentAttentionBlock(Projections):
    """down [R + L + r, D] (to the latents of query and key, and the rotated key), their norms [R] and [L];
    q [H (p + r), R] ([H (p + r), D] without a rank of queries); kv_up [H (p + v), L]; o [D, H v].
    """

    def __init__(self, spec: AttentionSpec, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        latent = spec.latent
        assert latent is not None
        self.spec, self.latent = spec, latent
        self.recompute_modules: frozenset[RecomputedModule] = frozenset()

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype))

        heads, rank = spec.num_heads, latent.query_rank
        self.down = weight(sum(latent.down_widths), hidden_size)
        self.q_latent_norm = None if rank is None else weight(rank)
        self.q = weight(heads * latent.query_dim, hidden_size if rank is None else rank)
        self.kv_latent_norm = weight(latent.kv_rank)
        self.kv_up = weight(heads * (latent.plain_dim + latent.value_dim), latent.kv_rank)
        self.o = weight(hidden_size, heads * latent.value_dim)
        self.indexer = None if spec.indexer is None else Indexer(spec, hidden_size, dtype)

    def forward(self, x: Tensor, rotation: Tensor, attention: Attention, layer: int) -> Tensor:
        """x [T, D], rotation as `numerics.rotations` gives it -> [T, D]."""
        spec, latent, numerics = self.spec, self.latent, self.numerics
        q_latent, kv_latent, k_rotated = self.project("down", x).split(latent.down_widths, -1)
        if self.q_latent_norm is not None:
            q_latent = rms_norm(q_latent, self.q_latent_norm, EPS)
        q = self.project("q", x if self.q_latent_norm is None else q_latent)
        q_plain, q_rotated = q.view(len(x), spec.num_heads, -1).split(
            (latent.plain_dim, latent.rotated_dim), -1
        )
        rotated = self._rotated(torch.cat((q_rotated, k_rotated.unsqueeze(1)), 1), rotation)
        to_keys, to_values = (
            self.matrix("kv_up")
            .view(spec.num_heads, -1, latent.kv_rank)
            .split((latent.plain_dim, latent.value_dim), 1)
        )
        q_absorbed = numerics.per_head(q_plain, to_keys.transpose(1, 2))
        q = torch.cat((q_absorbed, rotated[:, :-1]), -1) * spec.query_factor
        kv_latent = rms_norm(kv_latent, self.kv_latent_norm, EPS).unsqueeze(1)
        keys = torch.cat((kv_latent, rotated[:, -1:]), -1)
        run = again if "core_attn" in self.recompute_modules else once
        if self.indexer is None:
            q, keys = numerics.attention_input(q), numerics.attention_input(keys)
            out = run(attention.attend, layer, q, keys, keys, spec).to(x.dtype)
        else:
            if not isinstance(attention, SparseAttention):
                raise RunError(f"{type(attention).__name__} does not carry sparse attention by an indexer")
            index_q, index_key, index_weights = self.indexer(x, q_latent, rotation)
            rows = torch.cat((keys, index_key), -1)
            out = run(attention.attend_sparse, layer, q, rows, index_q, index_weights, spec)
        seen = out.view(len(x), spec.num_heads, -1)[..., : latent.kv_rank]
        return self.project("o", numerics.per_head(seen, to_values).flatten(1))

    def _rotated(self, heads: Tensor, rotation: Tensor) -> Tensor:
        """[T, H + 1, r]."""
        if self.spec.rope.interleaved:
            heads = heads.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return self.numerics.rotate(heads, rotation)


class Indexer(Projections):
    """q [h e, R], k [e, D] under a layer norm, weights [h, D]: all frozen (see `IndexerSpec`)."""

    def __init__(self, spec: AttentionSpec, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        indexer, latent = spec.indexer, spec.latent
        assert indexer is not None and latent is not None and latent.query_rank is not None
        self.spec = indexer

        def frozen(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)

        self.q = frozen(indexer.num_heads * indexer.head_dim, latent.query_rank)
        self.k = frozen(indexer.head_dim, hidden_size)
        self.k_norm = frozen(indexer.head_dim)
        self.k_norm_bias = frozen(indexer.head_dim)
        self.weights = frozen(indexer.num_heads, hidden_size)

    @torch.no_grad()
    def forward(self, x: Tensor, q_latent: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D], q_latent [T, R] -> queries [T, h, e], key [T, 1, e], weights [T, h]."""
        norm, bias = self.k_norm.to(x.dtype), self.k_norm_bias.to(x.dtype)
        q = self._product("q", q_latent).view(len(x), self.spec.num_heads, -1)
        k = F.layer_norm(self._product("k", x), norm.shape, norm, bias, EPS).unsqueeze(1)
        turned = self.numerics.rotate(torch.cat((q, k), 1), rotation)
        return turned[:, :-1], turned[:, -1:], self._product("weights", x)

    def _product(self, name: str, x: Tensor) -> Tensor:
        """Frozen weights are whole fp32 on every rank of a sharded trainer, whatever it computes in."""
        return self.numerics.linear(self.rounded(name, x), self.matrix(name).to(x.dtype))
