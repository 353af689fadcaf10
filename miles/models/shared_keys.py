"""Layers that attend to the keys and values of an earlier one."""

from __future__ import annotations

from torch import Tensor

from miles.arch.spec import AttentionSpec
from miles.models.attention import Attention


class SharedKeys:
    """The attention of one forward in which some layers have no keys (`AttentionSpec.keys_of`): they attend
    as the layer that has them, so a cache holds them once.
    """

    def __init__(self, attention: Attention) -> None:
        self._attention = attention
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        if spec.keys_of is None:
            self._kept[layer] = (k, v)
            return self._attention.attend(layer, q, k, v, spec)
        return self._attention.attend(spec.keys_of, q, *self._kept[spec.keys_of], spec)
