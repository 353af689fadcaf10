"""Experts that a family publishes stacked, [experts, inputs, outputs], and the matrices inside them.

Quantised formats take matrices. Published checkpoints in such a format hold each projection of each expert by
itself, [outputs, inputs], as `torch.nn.Linear` does (llm-compressor's `SequentialLlama4TextExperts`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from miles.arch.checkpoint import published_tensors
from miles.arch.family import Shape
from miles.arch.spec import ArchSpec, MoeSpec

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_STACK = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")
_SPLIT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Cut:
    """A matrix [last - first, D]: the transpose of `stack`[expert, :, first:last] [D, last - first]."""

    stack: str
    expert: int
    first: int
    last: int

    def rows(self, begin: int, end: int) -> Cut:
        """Some rows of the matrix."""
        return replace(self, first=self.first + begin, last=self.first + end)


def is_stack(name: str) -> bool:
    """Whether a published tensor holds a projection of all experts of a layer."""
    return _STACK.search(name) is not None


def cuts(stack: str, shape: Shape) -> Iterator[tuple[str, Cut]]:
    """The matrices in a stacked tensor [E, D, outputs], under the names that they have when split."""
    block, _, kind = stack.rpartition(".")
    width = shape[2] // len(_PARTS[kind])
    for expert in range(shape[0]):
        for index, part in enumerate(_PARTS[kind]):
            cut = Cut(stack, expert, index * width, (index + 1) * width)
            yield f"{block}.{expert}.{part}.weight", cut


def stacks(spec: ArchSpec) -> dict[str, Shape]:
    """The tensors that the model's family publishes stacked; none for most families."""
    if spec.moe is None or not spec.moe.stacked:
        return {}
    return {name: shape for name, shape in published_tensors(spec).items() if is_stack(name)}


def with_split_experts(spec: ArchSpec) -> ArchSpec:
    """The same model with every expert's matrices by themselves."""
    if spec.moe is None or not spec.moe.stacked:
        return spec
    layers = tuple(
        replace(layer, mlp=replace(layer.mlp, stacked=False)) if isinstance(layer.mlp, MoeSpec) else layer
        for layer in spec.layers
    )
    return replace(spec, layers=layers)


def split_experts(spec: ArchSpec) -> list[str]:
    """Names of the matrices of stacked experts once they are split; none of a model without such experts."""
    return [name for stack, shape in stacks(spec).items() for name, _ in cuts(stack, shape)]


def held_spec(spec: ArchSpec, names: Iterable[str]) -> ArchSpec:
    """The layout of a checkpoint that holds tensors of these names."""
    return with_split_experts(spec) if any(_SPLIT.search(name) for name in names) else spec
