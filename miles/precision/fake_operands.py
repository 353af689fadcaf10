"""What the trainer multiplies under a quantised format: rounded weights and activations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from miles.arch.precision import NumberFormat
from miles.precision.pieces import round_trip, rounded_activations, runs
from miles.precision.straight_through import straight_through


class FakeOperands:
    """Both operands of the product with one matrix. Implements `models.projections.Operands`.

    pieces: rows of the published matrices that the parameter is made of, in their order.
    """

    def __init__(self, target: NumberFormat, pieces: Sequence[int]) -> None:
        self.target, self.runs = target, runs(target, pieces)

    def weight(self, own: Tensor | None) -> Tensor:
        """`own` [..., N], rounded as the engine's copy is."""
        assert own is not None, "a trainer has weights"
        return straight_through(own, lambda matrix: round_trip(self.target, matrix, self.runs))

    def activations(self, x: Tensor) -> Tensor:
        """x [T, N], rounded where the format rounds activations."""
        return rounded_activations(self.target, x)
