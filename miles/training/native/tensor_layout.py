"""Where the trainer's tensors lie: whole in one process, or cut over ranks (`sharded_tensors`).

Weights, gradients and moments are given under native names (`Decoder.named_parameters()`) and leave and
arrive under published ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from miles.arch.spec import ArchSpec
from miles.models.decoder import Decoder
from miles.models.mtp import MtpDraft
from miles.weights.hf import stored_dtype
from miles.weights.native_map import load_views, published_views

NamedTensors = Iterable[tuple[str, Tensor]]


class TensorLayout(Protocol):
    """What the trainer does with tensors that may be cut. Every method is collective over the ranks."""

    writes: bool
    """Whether this process gets whole tensors from `published`, and writes files."""

    def make_decoder(self, spec: ArchSpec, dtype: torch.dtype) -> Decoder:
        """An uninitialised decoder that computes in `dtype`."""

    def make_draft(self, spec: ArchSpec, dtype: torch.dtype) -> MtpDraft:
        """The model's MTP layers, likewise."""

    def published(
        self,
        spec: ArchSpec,
        native: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        everywhere: bool = False,
    ) -> Iterator[tuple[str, Tensor]]:
        """Whole detached tensors under published names, converted to `dtype` when given (router biases are
        fp32).

        On ranks other than the first it is empty unless `everywhere` is set, but must still be iterated to
        its end.
        """

    def load(self, spec: ArchSpec, native: Mapping[str, Tensor], items: NamedTensors, where: str) -> None:
        """Fill `native` from published tensors. Raises CheckpointError, see `weights.native_map`."""

    def set_first_element(
        self, spec: ArchSpec, native: Mapping[str, Tensor], name: str, value: float
    ) -> None:
        """Overwrite the first element of one published tensor."""

    def total_norm(self, tensors: Iterable[Tensor]) -> Tensor:
        """The 2-norm over all elements of all tensors, a scalar."""


class WholeTensors:
    """The layout of one process: published tensors are views."""

    writes = True

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def make_decoder(self, spec: ArchSpec, dtype: torch.dtype) -> Decoder:
        return Decoder(spec, dtype=dtype).to(self._device)

    def make_draft(self, spec: ArchSpec, dtype: torch.dtype) -> MtpDraft:
        return MtpDraft(spec, dtype=dtype).to(self._device)

    def published(
        self,
        spec: ArchSpec,
        native: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        everywhere: bool = False,
    ) -> Iterator[tuple[str, Tensor]]:
        for name, view in published_views(spec, _detached(native)):
            yield name, view if dtype is None else view.to(stored_dtype(name, dtype))

    def load(self, spec: ArchSpec, native: Mapping[str, Tensor], items: NamedTensors, where: str) -> None:
        load_views(spec, _detached(native), items, where)

    def set_first_element(
        self, spec: ArchSpec, native: Mapping[str, Tensor], name: str, value: float
    ) -> None:
        dict(published_views(spec, _detached(native)))[name].view(-1)[0] = value

    def total_norm(self, tensors: Iterable[Tensor]) -> Tensor:
        return torch.nn.utils.get_total_norm(tensors)


def _detached(native: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in native.items()}
