"""What a local parameter consists of: ranges of published tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron.core import parallel_state
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """`length` rows (or columns, `dim` 1) from `start` on of published tensor `name`. `view` takes them out
    of a tensor of the parameter's shape; it may have more dimensions than the range, in the same order.

    `within`: dimension, start and length of a range of those, where experts are published as one tensor.
    """

    name: str
    dim: int
    start: int
    length: int
    view: Callable[[Tensor], Tensor]
    within: tuple[int, int, int] | None = None

    @property
    def has_first_element(self) -> bool:
        """Whether the first element of the published tensor is in it."""
        return self.start == 0 and (self.within is None or self.within[1] == 0)

    def range_of(self, published: Tensor) -> Tensor:
        """This piece of a whole published tensor, a view."""
        found = published.narrow(self.dim, self.start, self.length)
        return found if self.within is None else found.narrow(*self.within)

    def store(self, published: Tensor, local: Tensor) -> None:
        """Copy this piece of a published tensor into its place in a local one."""
        view = self.view(local)
        view.copy_(self.range_of(published).reshape(view.shape))

    def give(self, local: Tensor, published: Tensor) -> None:
        """Copy this piece of a local tensor into its place in a published one."""
        target = self.range_of(published)
        target.copy_(self.view(local).reshape(target.shape))


@dataclass(frozen=True)
class Shard:
    """This rank's place in the dimensions that cut tensors."""

    tp: int
    tp_size: int
    etp: int
    etp_size: int
    ep: int
    ep_size: int
    writes_dense: bool
    """Whether this rank is the one of its data-parallel copies that hands out dense parameters."""
    writes_experts: bool

    @classmethod
    def current(cls) -> Shard:
        return cls(
            tp=parallel_state.get_tensor_model_parallel_rank(),
            tp_size=parallel_state.get_tensor_model_parallel_world_size(),
            etp=parallel_state.get_expert_tensor_parallel_rank(),
            etp_size=parallel_state.get_expert_tensor_parallel_world_size(),
            ep=parallel_state.get_expert_model_parallel_rank(),
            ep_size=parallel_state.get_expert_model_parallel_world_size(),
            writes_dense=parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0,
            writes_experts=parallel_state.get_expert_data_parallel_rank() == 0,
        )


@dataclass(frozen=True)
class Place:
    """A parameter of this rank, its pieces, and whether this rank is the one that hands them out."""

    parameter: str
    pieces: tuple[Piece, ...]
    writes: bool


def replicated(name: str, theirs: str, parameter: Tensor, shard: Shard) -> Place:
    """A parameter that every tensor-parallel rank has whole."""
    piece = Piece(theirs, 0, 0, parameter.shape[0], lambda local: local)
    return Place(name, (piece,), shard.writes_dense and shard.tp == 0)


def rows(theirs: str, parameter: Tensor, rank: int) -> Piece:
    """One of the ranges of rows that a published tensor is cut into."""
    height = parameter.shape[0]
    return Piece(theirs, 0, rank * height, height, lambda local: local)


def columns(theirs: str, parameter: Tensor, rank: int) -> Piece:
    """One of the ranges of columns."""
    width = parameter.shape[1]
    return Piece(theirs, 1, rank * width, width, lambda local: local)
