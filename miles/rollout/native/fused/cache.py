"""Keys and values as the kernel reads them."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int64

import torch

from miles.arch.spec import ArchSpec
from miles.models.lazy_memory import give_back, lazy_zeros
from miles.rollout.native.fused.kernel import Library


class BlockCache:
    """Keys in blocks of vectors and values, see attention.h. A slot belongs to one sequence.

    keys [L, slots, Hkv, blocks, d, lanes], values [L, slots, Hkv, blocks * lanes, d in whole vectors]; fp32.
    """

    def __init__(self, library: Library, spec: ArchSpec, num_slots: int, max_len: int) -> None:
        attention, lanes = spec.layers[0].attention, library.num_lanes
        assert all(layer.attention == attention for layer in spec.layers), "one cache shape for all layers"
        blocks, width = -(-max_len // lanes), -(-attention.head_dim // lanes) * lanes
        shape = (spec.num_layers, num_slots, attention.num_kv_heads)
        self.keys = lazy_zeros((*shape, blocks, attention.head_dim, lanes), torch.float32)
        self.values = lazy_zeros((*shape, blocks * lanes, width), torch.float32)
        self._library, self._shape, self._lanes = library, shape, lanes
        caches = (self.keys, self.values)
        self._layout = [(cache.data_ptr(), cache.shape[3], cache.stride(3)) for cache in caches]

    def copy_slot(self, source: int, destinations: list[int], length: int) -> None:
        """Give each destination the first `length` positions of `source`."""
        self._copy([source] * len(destinations), destinations, length)

    def move_slots(self, sources: list[int], destinations: list[int], length: int) -> None:
        """Copy the first `length` positions of each source to its destination; no slot is both."""
        assert not set(sources) & set(destinations), "a move would overwrite a slot that is still to be read"
        self._copy(sources, destinations, length)

    def give_back(self, slots: range) -> None:
        """Return the memory of consecutive slots that hold nothing any more."""
        for cache in (self.keys, self.values):
            for layer in cache:
                give_back(layer[slots.start : slots.stop])

    def _copy(self, sources: Sequence[int], destinations: Sequence[int], length: int) -> None:
        ids = c_int64 * len(sources)
        pairs = (ids(*sources), ids(*destinations), len(sources))
        blocks = -(-length // self._lanes)
        for (address, rows, row), used in zip(self._layout, (blocks, length), strict=True):
            self._library.copy_slots(address, *self._shape, rows * row, used * row, *pairs)
