"""Softmax of rows shorter than a vector."""

from __future__ import annotations

import pytest
import torch

from miles.models import invariant
from miles.models.invariant import softmax_of_rows


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("width", [1, 5, 8, 15, 16, 20])
def test_softmax_of_rows_of_any_width_is_softmax(width: int, lanes: int, monkeypatch) -> None:
    monkeypatch.setattr(invariant, "LANES", lanes)
    own, plain = (torch.linspace(-9, 9, 40 * width).view(width, 40).t().requires_grad_() for _ in range(2))
    given = torch.cos(torch.arange(40.0 * width)).view(40, width)
    found, expected = softmax_of_rows(own), torch.softmax(plain, -1)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)
    (gradient,), (of_plain,) = (
        torch.autograd.grad(out, x, given) for out, x in ((found, own), (expected, plain))
    )
    torch.testing.assert_close(gradient, of_plain)


def test_short_rows_have_their_bits_among_any_others() -> None:
    x = torch.randn(64, 7, generator=torch.Generator().manual_seed(3)) * 4
    together = softmax_of_rows(x)
    for start, count in ((0, 1), (5, 3), (11, 17), (2, 33)):
        assert torch.equal(softmax_of_rows(x[start : start + count]), together[start : start + count])
