"""What the trainer multiplies under a quantised format: rounded weights and activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from miles.arch.precision import NumberFormat
from miles.precision.pieces import quantised_run, round_trip, rounded_activations, runs
from miles.precision.rounding_sums import activation_sums, rounding_sums
from miles.precision.straight_through import straight_through


class FakeOperands:
    """Both operands of the product with one matrix. Implements `models.projections.Operands`.

    pieces: rows of the published matrices that the parameter is made of, in their order.
    """

    def __init__(self, target: NumberFormat, pieces: Sequence[int]) -> None:
        self.target, self.runs = target, runs(target, pieces)
        self.weight_sums: Tensor | None = None
        self.activation_sums: Tensor | None = None
        self._measure_weight = self._measure_activations = False

    def measure(self) -> None:
        """Take the sums of the next product's operands (`rounding_sums`), in place of older ones."""
        self.weight_sums = self.activation_sums = None
        self._measure_weight = True
        self._measure_activations = self.target.rounds_activations

    def weight(self, own: Tensor | None) -> Tensor:
        """`own` [..., N], rounded as the engine's copy is."""
        assert own is not None, "a trainer has weights"
        if self._measure_weight:
            self._measure_weight = False
            self.weight_sums = self._sums_of(own.detach().reshape(-1, own.shape[-1]))
        return straight_through(own, lambda matrix: round_trip(self.target, matrix, self.runs))

    def activations(self, x: Tensor) -> Tensor:
        """x [T, N], rounded where the format rounds activations."""
        if self._measure_activations and x.numel():
            self._measure_activations = False
            self.activation_sums = activation_sums(self.target, x)
        return rounded_activations(self.target, x)

    @torch.no_grad()
    def _sums_of(self, matrix: Tensor) -> Tensor:
        parts = [
            rounding_sums(self.target, matrix[run.start : run.stop], quantised_run(self.target, matrix, run))
            for run in self.runs
        ]
        return torch.stack(parts).sum(0)
