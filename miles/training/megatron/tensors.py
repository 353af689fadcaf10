"""Tensors of all ranks under published names: weights in, and weights, gradients and moments out.

Arriving, each rank takes its pieces of every published tensor and exchanges nothing. Leaving, published
tensors are gathered in buckets of bounded size: every byte is given by exactly one rank and added to zeros
of the others, as whole numbers, so that no bit changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from miles.arch import ArchSpec, published_tensors
from miles.arch.families import FAMILIES
from miles.arch.family import Shape
from miles.training.megatron.draft_model import DraftModel
from miles.training.megatron.model import PolicyModel
from miles.training.megatron.pieces import Piece, Place, Shard
from miles.training.megatron.places import draft_places, places, weights
from miles.weights.hf import stored_dtype
from miles.weights.native_map import load_each

BUCKET_BYTES = 256 << 20
"""Of published tensors that are gathered at once; a larger tensor is a bucket of its own."""

OfParameter = Callable[[torch.nn.Parameter], Tensor]
"""The tensor wanted for a parameter, of the parameter's shape: itself, its gradient, a moment."""


IsShared = Callable[[torch.nn.Parameter], bool]


@dataclass(frozen=True)
class LocalPiece:
    """A piece that this rank holds, of which parameter, and whether it is this rank that hands it out.

    `gives_part`: of a state that data-parallel ranks share out, whether it gives its part.
    """

    piece: Piece
    parameter: torch.nn.Parameter
    writes: bool
    gives_part: bool


class MegatronTensors:
    """The parameters of this rank's chunks, and of the MTP layers where it has them, under published names.

    `spec.mtp`: whether the model has any, on whichever rank.
    """

    def __init__(
        self,
        spec: ArchSpec,
        chunks: Iterable[PolicyModel],
        device: torch.device,
        draft: DraftModel | None = None,
    ) -> None:
        self._spec, self._device = spec, device
        self._shapes: dict[str, Shape] = published_tensors(spec)
        self._local: dict[str, list[LocalPiece]] = {name: [] for name in self._shapes}
        self._copies: dict[str, list[str]] = {}
        for copy, original in FAMILIES[spec.family].mtp_copies(spec):
            self._copies.setdefault(original, []).append(copy)
        shard = Shard.current()
        # Of ranks that hold the same weights, each has another part of a state that they share out.
        sharing = replace(shard, writes_dense=True, writes_experts=True)
        for chunk in chunks:
            self._take(chunk, places(chunk, spec, shard), places(chunk, spec, sharing))
        if draft is not None:
            self._take(draft, draft_places(draft, spec, shard), draft_places(draft, spec, sharing))

    def _take(self, module: nn.Module, found: Iterator[Place], sharing: Iterator[Place]) -> None:
        parameters = dict(weights(module))
        for place, shared in zip(found, sharing, strict=True):
            for piece in place.pieces:
                local = LocalPiece(piece, parameters[place.parameter], place.writes, shared.writes)
                self._local[piece.name].append(local)

    @torch.no_grad()
    def load(
        self, items: Iterable[tuple[str, Tensor]], where: str, of: OfParameter = lambda parameter: parameter
    ) -> None:
        """Fill this rank's tensors from whole published ones, in any dtype. Raises CheckpointError."""

        def store(name: str, tensor: Tensor) -> None:
            for local in self._local[name]:
                local.piece.store(tensor, of(local.parameter))

        def differs(name: str, tensor: Tensor) -> bool:
            return any(
                not torch.equal(
                    local.piece.view(of(local.parameter)).reshape(-1),
                    local.piece.range_of(tensor).reshape(-1).to(of(local.parameter)),
                )
                for local in self._local[name]
            )

        shapes = {name: torch.Size(shape) for name, shape in self._shapes.items()}
        load_each(self._spec, shapes, store, differs, items, where)

    @torch.no_grad()
    def published(
        self,
        dtype: torch.dtype,
        of: OfParameter = lambda parameter: parameter,
        everywhere: bool = False,
        shared: IsShared = lambda _: False,
    ) -> Iterator[tuple[str, Tensor]]:
        """Whole detached tensors in `dtype`, but router biases in fp32. Every rank must iterate to the end;
        only the first is given tensors, or all of them with `everywhere`.

        `shared`: of which parameters each of the ranks that hold the same weights gives another part, in
        zeros.
        """
        for bucket in self._buckets(dtype):
            flat = self._gather(bucket, stored_dtype(bucket[0], dtype), of, everywhere, shared)
            if everywhere or dist.get_rank() == 0:
                for name, tensor in self._cut(flat, bucket):
                    yield name, tensor
                    yield from ((copy, tensor) for copy in self._copies.get(name, ()))

    @torch.no_grad()
    def norm(self, names: Iterable[str], of: OfParameter) -> float:
        """The 2-norm over these tensors, each element counted once, the same on every rank."""
        total = torch.zeros((), dtype=torch.float32, device=self._device)
        for local in (local for name in names for local in self._local[name] if local.writes):
            total += local.piece.view(of(local.parameter)).float().square().sum()
        if dist.get_world_size() > 1:
            dist.all_reduce(total)
        return float(total.sqrt())

    def set_first_element(self, name: str, value: float, of: OfParameter) -> None:
        """Overwrite the first element of one published tensor, on the ranks that hold it."""
        for local in self._local[name]:
            if local.piece.has_first_element:
                local.piece.view(of(local.parameter))[(0,) * len(self._view_shape(local))] = value

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """What `published` gives: all tensors, and what MTP layers hold a second time."""
        shapes = {name: torch.Size(shape) for name, shape in self._shapes.items()}
        copies = {copy: shapes[name] for name, copies in self._copies.items() for copy in copies}
        return shapes | copies

    @property
    def names(self) -> list[str]:
        """All published tensors of the model."""
        return list(self._shapes)

    @property
    def draft_names(self) -> list[str]:
        """Those of the MTP layers."""
        policy = published_tensors(self._spec.policy)
        return [name for name in self._shapes if name not in policy]

    def _view_shape(self, local: LocalPiece) -> torch.Size:
        return local.piece.view(local.parameter).shape

    def _buckets(self, dtype: torch.dtype) -> Iterator[list[str]]:
        """Names in buckets of one format each."""
        plain = [name for name in self._shapes if stored_dtype(name, dtype) == dtype]
        for names in (plain, [name for name in self._shapes if stored_dtype(name, dtype) != dtype]):
            yield from self._cut_buckets(names, dtype)

    def _cut_buckets(self, names: list[str], dtype: torch.dtype) -> Iterator[list[str]]:
        bucket: list[str] = []
        size = 0
        for name in names:
            shape = self._shapes[name]
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            if bucket and size + nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(name)
            size += nbytes
        if bucket:
            yield bucket

    def _gather(
        self, names: list[str], dtype: torch.dtype, of: OfParameter, everywhere: bool, shared: IsShared
    ) -> Tensor:
        total = sum(torch.Size(self._shapes[name]).numel() for name in names)
        padded = -(-total * dtype.itemsize // 4) * 4 // dtype.itemsize
        flat = torch.zeros(padded, dtype=dtype, device=self._device)
        for name, tensor in self._cut(flat, names):
            for local in self._local[name]:
                if local.gives_part if shared(local.parameter) else local.writes:
                    local.piece.give(of(local.parameter).detach(), tensor)
        if dist.get_world_size() > 1:
            words = flat.view(torch.int32)
            if everywhere:
                dist.all_reduce(words)
            else:
                dist.reduce(words, dst=0)
        return flat

    def _cut(self, flat: Tensor, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        offset = 0
        for name in names:
            shape = torch.Size(self._shapes[name])
            yield name, flat[offset : offset + shape.numel()].view(shape)
            offset += shape.numel()
