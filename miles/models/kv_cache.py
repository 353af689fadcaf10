"""Keys and values of every layer, slot and position; on the CPU memory is taken where they are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from miles.arch.spec import ArchSpec
from miles.models.lazy_memory import give_back, lazy_zeros

T = TypeVar("T")


class KVCache:
    """keys, values: [L, slots, Hkv, max_len, d]. A slot belongs to one sequence. Where a model's values are
    its keys (`AttentionSpec.latent`), both are one tensor.

    Unwritten positions are zero, so that a masked key never turns a sum into NaN.
    """

    def __init__(
        self,
        spec: ArchSpec,
        num_slots: int,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        attention = spec.layers[0].attention
        shapes = {(layer.attention.num_kv_heads, layer.attention.cache_dim) for layer in spec.layers}
        assert len(shapes) == 1, "one cache shape for all layers"
        shape = (spec.num_layers, num_slots, attention.num_kv_heads, max_len, attention.cache_dim)
        self.keys = lazy_zeros(shape, dtype, device)
        self.values = self.keys if attention.latent else lazy_zeros(shape, dtype, device)
        self.num_slots, self.num_kv_heads, self.max_len = num_slots, attention.num_kv_heads, max_len
        self.head_dim = attention.cache_dim
        self._workspace: tuple[object, Any] = (None, None)
        self._heads = torch.arange(self.num_kv_heads, device=device)
        self._key_rows = [layer.view(-1, self.head_dim) for layer in self.keys]
        self._value_rows = [layer.view(-1, self.head_dim) for layer in self.values]

    def workspace(self, key: object, make: Callable[[], T]) -> T:
        """What `make` gives, kept until another key is asked for."""
        if self._workspace[0] != key:
            self._workspace = (key, make())
        made: T = self._workspace[1]
        return made

    @property
    def nbytes(self) -> int:
        return sum(side.nbytes for side in self._sides)

    @property
    def _sides(self) -> tuple[Tensor, ...]:
        return (self.keys,) if self.values is self.keys else (self.keys, self.values)

    def give_back(self, slots: range) -> None:
        """Return the memory of consecutive slots that hold nothing any more, where that is possible."""
        for cache in self._sides:
            for layer in cache:
                give_back(layer[slots.start : slots.stop])

    def rows(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Where the heads of tokens at (slot, position) [T] live in a layer seen as rows: int64 [T * Hkv]."""
        heads = slots.unsqueeze(1) * self.num_kv_heads + self._heads
        return (heads * self.max_len + positions.unsqueeze(1)).flatten()

    def write(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys, values [T, Hkv, d] at `rows` (see `rows`)."""
        dtype = self.keys.dtype
        self._key_rows[layer].index_copy_(0, rows, keys.reshape(-1, self.head_dim).to(dtype))
        if self.values is not self.keys:
            self._value_rows[layer].index_copy_(0, rows, values.reshape(-1, self.head_dim).to(dtype))

    def move_rows(self, sources: Tensor, destinations: Tensor) -> None:
        """Copy rows (see `rows`) of every layer; all are read before the first is written."""
        for cache in self._sides:
            flat = cache.view(cache.shape[0], -1, self.head_dim)
            flat.index_copy_(1, destinations, flat.index_select(1, sources))

    def copy_slot(self, source: int, destinations: list[int], length: int) -> None:
        """Give each destination the first `length` positions of `source` (a prompt shared by a group)."""
        for cache in self._sides:
            prefix = cache[:, source : source + 1, :, :length]
            if _is_run(destinations):
                cache[:, destinations[0] : destinations[-1] + 1, :, :length] = prefix
            else:
                cache[:, destinations, :, :length] = prefix

    def move_slots(self, sources: list[int], destinations: list[int], length: int) -> None:
        """Copy the first `length` positions of each source to its destination (compaction).

        No slot may be both a source and a destination.
        """
        assert not set(sources) & set(destinations), "a move would overwrite a slot that is still to be read"
        for cache in self._sides:
            cache[:, destinations, :, :length] = cache[:, sources, :, :length]


def _is_run(slots: list[int]) -> bool:
    return slots == list(range(slots[0], slots[0] + len(slots)))
