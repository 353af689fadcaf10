"""The clipped value loss and the explained variance, beside their definitions."""

from __future__ import annotations

import pytest
import torch

from miles.algorithms.value_loss import ValueRows, explained_variance, value_loss

OLD = torch.tensor([0.0, 0.0, 0.0, 1.0])
RETURNS = torch.tensor([1.0, 1.0, 1.0, 0.0])
NOW = [0.1, 0.5, -0.5, 0.4]
"""A small move, a large one towards the return, a large one away from it, a large one down to it."""


def rows(weights: list[float]) -> tuple[torch.Tensor, ValueRows]:
    values = torch.tensor(NOW, requires_grad=True)
    return values, ValueRows(values, OLD, RETURNS, torch.tensor(weights))


def test_a_value_that_moved_far_towards_its_return_gets_no_more_gradient() -> None:
    values, given = rows([0.25] * 4)
    output = value_loss(given, clip=0.2)
    expected = [0.9**2, 0.8**2, 1.5**2, 0.8**2]
    assert output.loss.item() == pytest.approx(sum(expected) / 4)
    assert output.metrics["value_clipfrac"].item() == 0.5
    (slope,) = torch.autograd.grad(output.loss, values)
    torch.testing.assert_close(slope, torch.tensor([2 * (0.1 - 1), 0.0, 2 * (-0.5 - 1), 0.0]) / 4)


def test_metrics_of_micro_batches_add_up() -> None:
    whole = value_loss(rows([0.1, 0.2, 0.3, 0.4])[1], clip=0.2).metrics
    halves = ([0.1, 0.2, 0.0, 0.0], [0.0, 0.0, 0.3, 0.4])
    parts = [value_loss(rows(weights)[1], clip=0.2).metrics for weights in halves]
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value)


def test_explained_variance_of_trained_rows() -> None:
    returns, mask = torch.tensor([1.0, 2.0, 6.0, 99.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.full((4,), 3.0), returns, mask) == 0
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)
    nothing = torch.tensor([1.0, 2.0, 6.0, torch.nan])
    assert explained_variance(nothing, returns, mask) == 1
    assert explained_variance(returns, torch.ones(4), mask) is None
