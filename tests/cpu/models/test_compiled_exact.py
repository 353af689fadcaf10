"""Compiled exact operations: torch's results and gradients, and a row's bits whatever the other rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from miles.arch.spec import AttentionSpec, MoeSpec, RopeSpec
from miles.models.compiled import build
from miles.models.compiled.attention import MOST_VISIBLE
from miles.models.compiled.exact import CompiledExactNumerics
from miles.models.compiled.library import Library
from miles.models.decoder import AttentionBlock
from miles.models.logprob import token_log_probs
from miles.models.numerics import FAST, Numerics
from miles.models.routing import Router
from tests.cpu.models.test_compiled import COMPILER, assert_alike, numbers, offsets

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no compiler")
ROWS = 61


@pytest.fixture(scope="module")
def exact() -> CompiledExactNumerics:
    assert COMPILER is not None
    return CompiledExactNumerics(Library(build.library(COMPILER.path)))


def linear(numerics: Numerics, x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
    return numerics.linear(x, weight, *bias)


@pytest.mark.parametrize("shape", [(64, 96), (30, 37), (17, 5), (700, 40)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_products(exact: CompiledExactNumerics, shape: tuple[int, int], biased: bool) -> None:
    inputs, outputs = shape
    operands = [numbers(ROWS, inputs), numbers(outputs, inputs, seed=1) / 8, numbers(outputs, seed=2)]
    assert_alike(linear, exact, operands if biased else operands[:2])


@pytest.mark.parametrize("width", [64, 20, 3])
def test_gated_activation(exact: CompiledExactNumerics, width: int) -> None:
    assert_alike(lambda numerics, x: numerics.swiglu(x), exact, [numbers(ROWS, 2 * width) * 4])


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (5, 1), (37, 6)])
def test_router(exact: CompiledExactNumerics, normed: bool, experts: int, top_k: int) -> None:
    spec = MoeSpec(experts, top_k, 32, norm_topk_prob=normed)

    def weights(numerics: Numerics, x: Tensor, router: Tensor) -> Tensor:
        scores = numerics.router_scores(x, router, "softmax")
        return Router.decide().select(0, scores, spec, None, numerics.gating)[1]

    assert_alike(weights, exact, [numbers(ROWS, 40), numbers(experts, 40, seed=1) / 4])


def test_of_equal_scores_the_smaller_id_is_chosen(exact: CompiledExactNumerics) -> None:
    ids = exact.gating.decide(
        torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.1, 0.4, 0.1, 0.4]]), MoeSpec(4, 3, 8, True), None
    )
    assert ids.tolist() == [[0, 1, 2], [1, 3, 0]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [None, 7])
def test_log_probs(exact: CompiledExactNumerics, temperature: float, chunk: int | None) -> None:
    targets = torch.arange(ROWS) % 53

    def log_probs(numerics: Numerics, hidden: Tensor, head: Tensor) -> Tensor:
        how = {"linear": numerics.linear, "log_softmax": numerics.log_softmax}
        return token_log_probs(hidden, head, targets, temperature, chunk, **how)[0]

    assert_alike(log_probs, exact, [numbers(ROWS, 32), numbers(53, 32, seed=1)])


@pytest.mark.parametrize("shared", [True, False], ids=["shared prompts", "packed"])
def test_long_sequences(exact: CompiledExactNumerics, shared: bool) -> None:
    """Longer than the compiled backward takes."""
    block = AttentionBlock(AttentionSpec(4, 2, 16, RopeSpec(1e4), True, False), 40, 1e-6, torch.float32)
    weights = {name: numbers(*p.shape, seed=i) / 4 for i, (name, p) in enumerate(block.named_parameters(), 1)}
    prompts, own, prompt_of_own = [MOST_VISIBLE + 3, 5], [70, 9, 33], torch.tensor([0, 0, 1])
    before = [prompts[i] if shared else 0 for i in prompt_of_own]
    starts = [(0, n) for n in prompts] + list(zip(before, own, strict=True))
    positions = torch.cat([torch.arange(start, start + n) for start, n in starts])

    def attended(numerics: Numerics, x: Tensor, *given: Tensor) -> Tensor:
        block.numerics = numerics
        if shared:
            attention = numerics.prefix_attention(offsets(prompts), offsets(own), prompt_of_own)
        else:
            attention = numerics.packed_attention(offsets([*prompts, *own]))
        inputs = (x, numerics.rotations(block.spec, 512, positions), attention, 0)
        found: Tensor = torch.func.functional_call(block, dict(zip(weights, given, strict=True)), inputs)
        return found

    assert_alike(attended, exact, [numbers(len(positions), 40), *weights.values()])


ROW_OPERATIONS: dict[str, Callable[[Numerics, Tensor], Tensor]] = {
    "norm": lambda numerics, x: numerics.rms_norm(x, numbers(48, seed=3), 1e-6),
    "product": lambda numerics, x: numerics.linear(x, numbers(45, 48, seed=3)),
    "gated activation": lambda numerics, x: numerics.swiglu(x),
    "router": lambda numerics, x: numerics.router_scores(x, numbers(9, 48, seed=3), "softmax"),
    "log-softmax": lambda numerics, x: numerics.log_softmax(x, 0.9),
}


def parting(operation: Callable[[Tensor], Tensor]) -> int:
    """Rows whose bits depend on how many there are, or on where they are."""
    x = numbers(ROWS, 48)
    together, wrong = operation(x), 0
    for count in (1, 2, 5, 7, 13, 60):
        for start in range(0, ROWS - count + 1, count):
            rows = slice(start, start + count)
            wrong += not torch.equal(operation(x[rows].clone()), together[rows])
    return wrong


@pytest.mark.parametrize("name", ROW_OPERATIONS)
def test_a_row_has_its_bits_among_any_others(exact: CompiledExactNumerics, name: str) -> None:
    assert parting(lambda x: ROW_OPERATIONS[name](exact, x)) == 0


def test_torch_s_products_part(exact: CompiledExactNumerics) -> None:
    """What is asked above can fail: a matrix library takes other kernels for other numbers of rows."""
    wide = numbers(45, 4096, seed=3)
    x = numbers(ROWS, 4096)
    fast = torch.equal(FAST.linear(x, wide)[:1], FAST.linear(x[:1], wide))
    ours = torch.equal(exact.linear(x, wide)[:1], exact.linear(x[:1], wide))
    assert ours and not fast
