"""On a processor without bf16 instructions products are computed in fp32: same formats, one rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from miles.models import narrow
from miles.models.experts import routed_experts
from miles.models.grouped import grouped_mm, grouped_outer
from miles.models.logprob import token_log_probs
from miles.models.numerics import FAST

STEP = 2**-7
"""Two neighbouring numbers of bf16 differ by at most this, relative to them."""
ROWS, INPUTS, OUTPUTS, HEADS, EXPERTS = 71, 48, 24, 3, 4
ENDS = torch.tensor([9, 9, 30, ROWS], dtype=torch.int32)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def experts(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    ids = torch.stack([torch.arange(ROWS) % EXPERTS, (torch.arange(ROWS) + 1) % EXPERTS], 1)
    return routed_experts(x, ids, weights, gate_up, down)


def log_probs(hidden: Tensor, head: Tensor) -> Tensor:
    return token_log_probs(hidden, head, torch.arange(ROWS) % OUTPUTS, linear=FAST.linear)[0]


X = numbers(ROWS, INPUTS)
MATRIX, BIAS = numbers(OUTPUTS, INPUTS, seed=1), numbers(OUTPUTS, seed=2)
PER_HEAD = [numbers(ROWS, HEADS, INPUTS), numbers(HEADS, OUTPUTS, INPUTS, seed=1)]
OPERATIONS: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "product": (FAST.linear, [X, MATRIX]),
    "product and bias": (FAST.linear, [X, MATRIX, BIAS]),
    "product per head": (FAST.per_head, PER_HEAD),
    "router": (lambda x, router: FAST.router_scores(x, router, "softmax"), [X, MATRIX]),
    "log-probs": (log_probs, [X, MATRIX]),
    "experts": (
        experts,
        [
            X,
            numbers(ROWS, 2, seed=4),
            numbers(EXPERTS, 2 * 16, INPUTS, seed=5) / 4,
            numbers(EXPERTS, INPUTS, 16, seed=6) / 4,
        ],
    ),
}


def results(operation: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """With gradients and without, and the gradient of each input."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = operation(*leaves)
    (out * numbers(*out.shape, seed=9)).sum().backward()
    with torch.no_grad():
        alone = operation(*leaves)
    return [out.detach(), alone, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """A processor without bf16. What torch is asked to multiply: the types, as they come."""
    seen: list[torch.dtype] = []
    monkeypatch.setattr(narrow, "is_slow", lambda dtype, device: dtype == torch.bfloat16)
    for name in ("matmul", "mm", "bmm"):
        real = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda a, b, real=real, **kw: seen.append(a.dtype) or real(a, b, **kw)
        )
    for name in ("linear", "grouped_mm"):
        real = getattr(torch.nn.functional, name)
        spy = lambda a, *rest, real=real, **kw: seen.append(a.dtype) or real(a, *rest, **kw)  # noqa: E731
        monkeypatch.setattr(torch.nn.functional, name, spy)
    return seen


@pytest.mark.parametrize("name", OPERATIONS)
def test_results_and_gradients_are_torch_s_to_one_rounding(name: str, widths: list[torch.dtype]) -> None:
    operation, inputs = OPERATIONS[name]
    ours = results(operation, inputs)
    assert set(widths) == {torch.float32}, "a product was computed in bf16"
    exact = results(operation, [x.float() for x in inputs])
    for mine, true in zip(ours, exact, strict=True):
        assert (mine.float() - true).abs().max() <= 2 * STEP * true.abs().max()


@pytest.mark.parametrize("name", OPERATIONS)
def test_types_are_those_of_the_operands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operation, inputs = OPERATIONS[name]
    plain = [x.dtype for x in results(operation, inputs)]
    monkeypatch.setattr(narrow, "is_slow", lambda dtype, device: dtype == torch.bfloat16)
    assert [x.dtype for x in results(operation, inputs)] == plain


def test_a_product_is_the_fp32_one_rounded_once(widths: list[torch.dtype]) -> None:
    expected = torch.nn.functional.linear(X.float(), MATRIX.float(), BIAS.float()).bfloat16()
    assert torch.equal(FAST.linear(X, MATRIX, BIAS), expected)


@pytest.mark.parametrize("rows", [narrow.FEWEST_ROWS - 1, narrow.FEWEST_ROWS])
def test_few_rows_are_left_to_torch(rows: int, widths: list[torch.dtype]) -> None:
    FAST.linear(X[:rows], MATRIX)
    wide = rows >= narrow.FEWEST_ROWS
    assert widths == [torch.float32 if wide else torch.bfloat16]


def test_groups_are_counted_by_their_mean(widths: list[torch.dtype]) -> None:
    matrices = numbers(len(ENDS), INPUTS, OUTPUTS)
    few = torch.tensor([1, 2, 3, 4], dtype=torch.int32)
    grouped_mm(X[:4], matrices, few)
    grouped_outer(X[:4], X[:4], few)
    assert set(widths) == {torch.bfloat16}
    widths.clear()
    grouped_mm(X, matrices, ENDS)
    grouped_outer(X, X, ENDS)
    assert set(widths) == {torch.float32}


def test_other_devices_and_fp32_are_left_alone() -> None:
    assert not narrow.is_slow(torch.float32, torch.device("cpu"))
    assert not narrow.is_slow(torch.bfloat16, torch.device("cuda"))
