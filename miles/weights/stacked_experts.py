"""Experts stacked, [E, inputs, outputs], and as matrices [outputs, inputs] (`arch.expert_layout`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from miles.arch import ArchSpec
from miles.arch.expert_layout import Cut, cuts, stacks
from miles.arch.family import Shape


def split_stack(name: str, stack: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The matrices in a stacked tensor, each contiguous."""
    for part, cut in cuts(name, tuple(stack.shape)):
        yield part, matrix_of(stack, cut)


def matrix_of(stack: Tensor, cut: Cut) -> Tensor:
    """One matrix out of a stacked tensor, contiguous."""
    return stack[cut.expert, :, cut.first : cut.last].mT.contiguous()


def restacked(spec: ArchSpec, items: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Published tensors with split experts stacked, as soon as all of a stack are there. What does not fit,
    is repeated or is left over comes as it is; so does everything of a model without stacks.
    """
    shapes = stacks(spec)
    place = {name: cut for stack, shape in shapes.items() for name, cut in cuts(stack, shape)}
    waiting: dict[str, dict[str, Tensor]] = {stack: {} for stack in shapes}
    for name, tensor in items:
        cut = place.get(name)
        fits = cut is not None and tensor.shape == (cut.last - cut.first, shapes[cut.stack][1])
        if cut is None or not fits or name in waiting.get(cut.stack, {name}):
            yield name, tensor
            continue
        parts = waiting[cut.stack]
        parts[name] = tensor
        if len(parts) * (cut.last - cut.first) == shapes[cut.stack][0] * shapes[cut.stack][2]:
            yield cut.stack, stacked(shapes[cut.stack], ((place[n], matrix) for n, matrix in parts.items()))
            del waiting[cut.stack]
    for parts in waiting.values():
        yield from parts.items()


def stacked(shape: Shape, matrices: Iterable[tuple[Cut, Tensor]]) -> Tensor:
    """All matrices of a stack as one tensor [E, inputs, outputs]."""
    whole: Tensor | None = None
    for cut, matrix in matrices:
        if whole is None:
            whole = torch.empty(shape, dtype=matrix.dtype, device=matrix.device)
        whole[cut.expert, :, cut.first : cut.last] = matrix.mT
    assert whole is not None, "a stack has experts"
    return whole
