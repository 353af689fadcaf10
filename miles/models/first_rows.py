"""Attention in a forward whose last rows fill it up: they belong to no sequence, and nobody reads them."""

from __future__ import annotations

from torch import Tensor

from miles.arch.spec import AttentionSpec
from miles.models.attention import Attention
from miles.models.row_blocks import filled_up
from miles.models.sparse_attention import SparseAttention


class FirstRows:
    """Attends with the first `count` rows alone; the others get numbers of any kind."""

    def __init__(self, attention: Attention, count: int) -> None:
        self._attention, self._count = attention, count

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        q_first, k_first, v_first = (x[: self._count] for x in (q, k, v))
        return filled_up(self._attention.attend(layer, q_first, k_first, v_first, spec), q.shape[0])

    def attend_sparse(
        self, layer: int, q: Tensor, rows: Tensor, index_q: Tensor, index_weights: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """See `sparse_attention.SparseAttention`."""
        attention = self._attention
        assert isinstance(attention, SparseAttention), "numerics of a sparse model attend sparsely"
        q_first, rows_first, index_first, weights_first = (
            x[: self._count] for x in (q, rows, index_q, index_weights)
        )
        out = attention.attend_sparse(layer, q_first, rows_first, index_first, weights_first, spec)
        return filled_up(out, q.shape[0])
