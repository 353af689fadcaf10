"""Tensors cut along their first dimension over the ranks (FSDP2's DTensors), under published names. What
gets no gradient (router biases, indexers) is whole on every rank.

Leaving, one native tensor is gathered at a time. Arriving, each rank takes its own rows of every published
tensor and exchanges nothing: a published tensor is a contiguous piece of a native one, and so is a shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from miles.arch.spec import ArchSpec
from miles.models.decoder import Decoder
from miles.models.mtp import MtpDraft
from miles.training.native.process_group import DataParallel
from miles.training.native.sharded_model import sharded_decoder, sharded_draft
from miles.training.native.tensor_layout import NamedTensors
from miles.weights.native_map import load_each, published_views, views_with_origin


class ShardedTensors:
    """The layout of data-parallel ranks. Implements `tensor_layout.TensorLayout`."""

    def __init__(self, parallel: DataParallel) -> None:
        self._parallel = parallel
        self.writes = parallel.rank == 0

    def make_decoder(self, spec: ArchSpec, dtype: torch.dtype) -> Decoder:
        return sharded_decoder(spec, dtype, self._parallel)

    def make_draft(self, spec: ArchSpec, dtype: torch.dtype) -> MtpDraft:
        return sharded_draft(spec, dtype, self._parallel)

    def published(
        self,
        spec: ArchSpec,
        native: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        everywhere: bool = False,
    ) -> Iterator[tuple[str, Tensor]]:
        for item in published_views(spec, _Gathering(native, dtype)):
            if everywhere or self.writes:
                yield item

    def load(self, spec: ArchSpec, native: Mapping[str, Tensor], items: NamedTensors, where: str) -> None:
        places = self._places(spec, native)

        def store(name: str, tensor: Tensor) -> None:
            place = places[name]
            place.held.copy_(tensor.reshape(-1)[place.begin : place.end])

        def differs(name: str, tensor: Tensor) -> bool:
            place = places[name]
            part = tensor.reshape(-1)[place.begin : place.end].to(place.held)
            different = torch.tensor(float(not torch.equal(part, place.held)))
            return self._parallel.sum(different).item() > 0

        shapes = {name: place.shape for name, place in places.items()}
        load_each(spec, shapes, store, differs, items, where)

    def set_first_element(
        self, spec: ArchSpec, native: Mapping[str, Tensor], name: str, value: float
    ) -> None:
        place = self._places(spec, native)[name]
        if place.begin == 0 and place.end > 0:
            place.held[0] = value

    def total_norm(self, tensors: Iterable[Tensor]) -> Tensor:
        own = torch.nn.utils.get_total_norm([_local(tensor) for tensor in tensors])
        # fp64: the square of a finite fp32 norm is finite.
        return self._parallel.sum(own.double().square()).sqrt().float()

    def _places(self, spec: ArchSpec, native: Mapping[str, Tensor]) -> dict[str, _Place]:
        whole = {name: torch.empty(tensor.shape, device="meta") for name, tensor in native.items()}
        return {
            name: self._place(native[origin], view.storage_offset(), view.shape)
            for origin, name, view in views_with_origin(spec, whole)
        }

    def _place(self, shard: Tensor, offset: int, shape: torch.Size) -> _Place:
        """Where elements offset .. offset + numel of the flat whole tensor lie in this rank's flat shard."""
        if not isinstance(shard, DTensor):
            return _Place(shape, 0, shape.numel(), shard.detach().view(-1))
        local = _local(shard)
        row = math.prod(shard.shape[1:])
        rows_per_rank = -(-shard.shape[0] // self._parallel.size)
        first = min(self._parallel.rank * rows_per_rank, shard.shape[0]) * row
        begin = min(max(offset, first), first + local.numel())
        end = max(begin, min(offset + shape.numel(), first + local.numel()))
        return _Place(shape, begin - offset, end - offset, local.view(-1)[begin - first : end - first])


@dataclass(frozen=True)
class _Place:
    """The flat elements begin .. end of a published tensor of `shape` are `held` by this rank, live."""

    shape: torch.Size
    begin: int
    end: int
    held: Tensor


class _Gathering(Mapping[str, Tensor]):
    """Native tensors that are gathered when they are looked up."""

    def __init__(self, native: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
        self._native, self._dtype = native, dtype

    def __getitem__(self, name: str) -> Tensor:
        held = self._native[name].detach()
        if self._dtype is not None and not name.endswith("correction_bias"):
            held = held.to(self._dtype)
        return held.full_tensor() if isinstance(held, DTensor) else held

    def __iter__(self) -> Iterator[str]:
        return iter(self._native)

    def __len__(self) -> int:
        return len(self._native)


def _local(tensor: Tensor) -> Tensor:
    """This rank's part; the whole of a tensor that is not cut."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()
