"""Matrices of a block whose operands may be rounded, or stored in another number format.

A block multiplies by its matrices through `Projections`, so that trainer and engine of one precision policy
multiply the same numbers. Shapes: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from miles.models.numerics import FAST, Numerics


class Operands(Protocol):
    """What one matrix is multiplied as. Absent: both operands as they are."""

    def weight(self, own: Tensor | None) -> Tensor:
        """The numbers to multiply by, in the shape and type of the parameter `own`; None where the weights
        are held elsewhere."""
        ...

    def activations(self, x: Tensor) -> Tensor:
        """x [T, K] as the product takes it."""
        ...


class Projections(nn.Module):
    """A block with matrices. `operands`: by the name of the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.numerics: Numerics = FAST
        self.operands: dict[str, Operands] = {}

    def matrix(self, name: str) -> Tensor:
        """The matrix as it is multiplied by; in the trainer with the gradient of the parameter."""
        own, operands = self._parameters[name], self.operands.get(name)
        if operands is not None:
            return operands.weight(own)
        assert own is not None, f"{name} has no weights"
        return own

    def rounded(self, name: str, x: Tensor) -> Tensor:
        """x [T, K] as the product with this matrix takes it."""
        operands = self.operands.get(name)
        return x if operands is None else operands.activations(x)

    def project(self, name: str, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, K] times the matrix [N, K] transposed, plus bias [N] -> [T, N]."""
        return self.numerics.linear(self.rounded(name, x), self.matrix(name), bias)
