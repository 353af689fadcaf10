"""Routed experts against a plain loop over tokens, for widths that suit the grouped kernel and others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from miles.models.experts import routed_experts


def plain(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    rows = []
    for token, experts, gates in zip(x, ids.tolist(), weights, strict=True):
        gate_ups = [F.linear(token, gate_up[e]).chunk(2) for e in experts]
        outs = [F.linear(F.silu(g) * u, down[e]) for e, (g, u) in zip(experts, gate_ups, strict=True)]
        rows.append(sum(gate * out for gate, out in zip(gates, outs, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("tokens", "hidden", "width", "experts", "top_k"),
    [(40, 16, 32, 8, 2), (11, 18, 7, 5, 3), (1, 20, 24, 4, 1), (6, 10, 5, 8, 8)],
)
@pytest.mark.parametrize("skewed", [False, True], ids=["spread", "experts without tokens"])
def test_values_and_gradients_equal_a_loop_over_tokens(
    tokens: int, hidden: int, width: int, experts: int, top_k: int, skewed: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, hidden), (tokens, top_k), (experts, 2 * width, hidden), (experts, hidden, width))
    x, weights, gate_up, down = (torch.randn(s, generator=generator).requires_grad_() for s in shapes)
    ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k]
    if skewed:
        ids = torch.arange(top_k).expand(tokens, -1)
    inputs = (x, weights, gate_up, down)
    got, wanted = (f(x, ids, weights, gate_up, down) for f in (routed_experts, plain))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    upstream = torch.randn(wanted.shape, generator=generator)
    gradients = zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(wanted, inputs, upstream), strict=True
    )
    for one, other in gradients:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_a_tokens_result_does_not_depend_on_the_other_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator)
    gate_up, down = torch.randn(4, 24, 16, generator=generator), torch.randn(4, 16, 12, generator=generator)
    ids = torch.arange(64).view(64, 1) % 4
    weights = torch.ones(64, 1)
    with torch.no_grad():
        everything = routed_experts(x, ids, weights, gate_up, down)
        half = routed_experts(x[:32], ids[:32], weights[:32], gate_up, down)
    assert torch.equal(everything[:32], half)
