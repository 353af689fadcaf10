"""Attention in a forward whose last rows fill it up: they belong to no sequence, and nobody reads them."""

from __future__ import annotations

from torch import Tensor

from miles.arch.spec import AttentionSpec
from miles.models.attention import Attention
from miles.models.row_blocks import filled_up


class FirstRows:
    """Attends with the first `count` rows alone; the others get numbers of any kind."""

    def __init__(self, attention: Attention, count: int) -> None:
        self._attention, self._count = attention, count

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        q_first, k_first, v_first = (x[: self._count] for x in (q, k, v))
        return filled_up(self._attention.attend(layer, q_first, k_first, v_first, spec), q.shape[0])
