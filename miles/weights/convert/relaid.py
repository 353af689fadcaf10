"""Experts from one layout into the other: matrices cut out of stacks, and stacks made of matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from miles.arch import ArchSpec
from miles.arch.expert_layout import cuts, stacks
from miles.arch.stored_weights import StoredWeight


def relaid(weights: Mapping[str, StoredWeight], spec: ArchSpec, target: ArchSpec) -> Iterator[StoredWeight]:
    """Stored weights as those of the layout `target`, in the order of the source.

    Args:
        spec: the model as its family publishes it.
    """
    shapes = stacks(spec)
    wanted = stacks(target)
    matrices = {name: cut.stack for stack, shape in shapes.items() for name, cut in cuts(stack, shape)}
    made: set[str] = set()
    for name, weight in weights.items():
        stack = matrices.get(name)
        if name in shapes and not wanted:
            yield from _matrices(weight)
        elif stack is None or not wanted:
            yield weight
        elif stack not in made:
            made.add(stack)
            yield _stack(stack, shapes[stack], weights)


def _matrices(weight: StoredWeight) -> Iterator[StoredWeight]:
    for name, cut in cuts(weight.name, weight.shape):
        shape = (cut.last - cut.first, weight.shape[1])
        yield StoredWeight(name, shape, weight.format, weight.parts, cut=cut)


def _stack(name: str, shape: tuple[int, ...], weights: Mapping[str, StoredWeight]) -> StoredWeight:
    pieces = tuple((cut, weights[part]) for part, cut in cuts(name, shape))
    parts = {part: entry for _, piece in pieces for part, entry in piece.parts.items()}
    return StoredWeight(name, shape, pieces[0][1].format, parts, pieces=pieces)
