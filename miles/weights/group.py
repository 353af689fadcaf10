"""The atomic unit of weights in motion."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that must be transformed together: a fused projection, or the stacked experts of a layer.

    `names` are those of the published checkpoint, in the order of `tensors`.
    """

    component: str
    """Which model they belong to: `policy`, `draft`, an adapter."""
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)
