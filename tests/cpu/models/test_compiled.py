"""The compiled operations give torch's results and gradients, and leave to torch what they do not take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from miles.arch.spec import AttentionSpec, RopeSpec
from miles.models.attention import PackedAttention
from miles.models.compiled import build
from miles.models.compiled.attention import MOST_VISIBLE, CompiledAttention
from miles.models.compiled.exact import CompiledExactNumerics
from miles.models.compiled.library import Library
from miles.models.compiled.numerics import LONGEST, CompiledNumerics
from miles.models.decoder import AttentionBlock
from miles.models.experts import routed_experts
from miles.models.numerics import FAST, ExactNumerics, Numerics
from miles.models.segment_attention import SHORT
from miles.planning.facts.compiler import read_compiler

COMPILER = read_compiler()
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no compiler")
CLOSE = 1e-5
"""Relative to the largest element."""


@pytest.fixture(scope="module")
def compiled() -> CompiledNumerics:
    assert COMPILER is not None
    return CompiledNumerics(Library(build.library(COMPILER.path)))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def results(operation: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """What it gives with and without gradients, and the gradient of each input."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = operation(*leaves)
    (out * numbers(*out.shape, seed=9)).sum().backward()
    with torch.no_grad():
        alone = operation(*leaves)
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return [out.detach(), alone, *gradients]


def assert_alike(operation: Callable[..., Tensor], compiled: Numerics, inputs: Sequence[Tensor]) -> None:
    ours, torchs = (results(partial(operation, numerics), inputs) for numerics in (compiled, FAST))
    for mine, other in zip(ours, torchs, strict=True):
        assert (mine - other).abs().max() <= CLOSE * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("width", [64, 30])
def test_norms(compiled: CompiledNumerics, width: int) -> None:
    def normed(numerics: Numerics, x: Tensor, weight: Tensor) -> Tensor:
        return numerics.rms_norm(x, weight, 1e-6)

    assert_alike(normed, compiled, [numbers(37, width), numbers(width, seed=1)])


@pytest.mark.parametrize(("hidden", "width"), [(64, 32), (32, 96), (48, 64), (64, 160)])
@pytest.mark.parametrize("top_k", [1, 3])
def test_experts(compiled: CompiledNumerics, hidden: int, width: int, top_k: int) -> None:
    """One of the experts is never chosen; widths that the kernel does not take are torch's."""
    tokens, experts = 211, 5
    ids = torch.stack([torch.randperm(experts - 1)[:top_k] for _ in range(tokens)])

    def routed(numerics: Numerics, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        kernels = numerics.expert_kernels(gate_up, down)
        return routed_experts(x, ids, weights, gate_up, down, kernels)

    matrices = [numbers(experts, 2 * width, hidden, seed=2) / 8, numbers(experts, hidden, width, seed=3) / 8]
    assert_alike(routed, compiled, [numbers(tokens, hidden), numbers(tokens, top_k, seed=1), *matrices])


@pytest.mark.parametrize("norm", ["head", "width", None])
@pytest.mark.parametrize("heads", [(4, 2, 16, None), (3, 3, 32, None), (2, 1, 16, 8), (2, 2, 8, None)])
@pytest.mark.parametrize("shared", [True, False], ids=["shared prompts", "packed"])
def test_attention(
    compiled: CompiledNumerics, norm: str | None, heads: tuple[int, int, int, int | None], shared: bool
) -> None:
    queries, keys, width, rotated = heads
    rope = RopeSpec(1e4, width=rotated)
    spec = AttentionSpec(queries, keys, width, rope, True, False, norm is not None, norm or "head")  # type: ignore[arg-type]
    assert_attends_alike(
        compiled, spec, [12, 1, 9, 17], [5, 7, 1, 3, 9, 12, 4], [0, 0, 1, 2, 2, 3, 3] if shared else None
    )


def assert_attends_alike(
    compiled: Numerics, spec: AttentionSpec, prompts: list[int], own: list[int], prompt_of: list[int] | None
) -> None:
    """A block over prompts and what continues them (None: over sequences of these lengths) as in torch."""
    block = AttentionBlock(spec, 40, 1e-6, torch.float32)
    names = [name for name, _ in block.named_parameters()]
    weights = [numbers(*p.shape, seed=i) / 4 for i, p in enumerate(block.parameters(), 1)]
    before = [0] * len(own) if prompt_of is None else [prompts[i] for i in prompt_of]
    positions = [torch.arange(n) for n in prompts]
    positions += [torch.arange(start, start + n) for start, n in zip(before, own, strict=True)]
    flat = torch.cat(positions)

    def attended(numerics: Numerics, x: Tensor, *weights: Tensor) -> Tensor:
        block.numerics = numerics
        if prompt_of is not None:
            attention = numerics.prefix_attention(offsets(prompts), offsets(own), torch.tensor(prompt_of))
        else:
            attention = numerics.packed_attention(offsets([*prompts, *own]))
        given = (x, numerics.rotations(spec, int(flat.max()) + 1, flat), attention, 0)
        found: Tensor = torch.func.functional_call(block, dict(zip(names, weights, strict=True)), given)
        return found

    assert_alike(attended, compiled, [numbers(len(flat), 40), *weights])


BOUNDS = (SHORT, MOST_VISIBLE, LONGEST)
"""Visible tokens up to which torch has all scores at once, backward and forward are compiled."""


@pytest.mark.parametrize("visible", [n + more for n in BOUNDS for more in (0, 1)])
@pytest.mark.parametrize("shared", [True, False], ids=["shared prompts", "packed"])
@pytest.mark.parametrize("rotated", [None, 8], ids=["taken", "left to torch"])
def test_attention_at_its_bounds(
    compiled: CompiledNumerics, visible: int, shared: bool, rotated: int | None
) -> None:
    spec = AttentionSpec(2, 1, 16, RopeSpec(1e4, width=rotated), True, False)
    if shared:
        assert_attends_alike(compiled, spec, [visible - 9, 4], [3, 9, 5], [0, 0, 1])
    else:
        assert_attends_alike(compiled, spec, [visible, 7], [], None)


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)))


def test_long_sequences_attend_in_torch(compiled: CompiledNumerics) -> None:
    """Counted as tokens that are seen: a short response sees its prompt too."""
    assert isinstance(compiled.packed_attention(offsets([LONGEST])), CompiledAttention)
    assert isinstance(compiled.packed_attention(offsets([LONGEST + 1])), PackedAttention)
    both = torch.tensor([0, 0])
    for more in (0, 1):
        assert compiled.takes_segments(offsets([LONGEST + more, 5])) == bool(more)
        assert compiled.takes_segments(offsets([LONGEST - 7, 7 + more, 4]), both) == bool(more)
    assert not compiled.takes_segments(offsets([SHORT]))


def test_only_fast_numerics_may_leave_their_order_to_torch(compiled: CompiledNumerics) -> None:
    long = offsets([LONGEST + 1])
    assert FAST.takes_segments(offsets([SHORT + 1])) and not FAST.takes_segments(offsets([SHORT]))
    assert not CompiledExactNumerics(compiled._library).takes_segments(long)
    assert not ExactNumerics({}, 1, 1).takes_segments(long)


def test_a_gradient_that_is_not_a_number_stays_one(compiled: CompiledNumerics) -> None:
    x = numbers(4, 64)
    x[2, 5] = float("nan")
    weight = torch.ones(64, requires_grad=True)
    compiled.rms_norm(x, weight, 1e-6).sum().backward()
    assert weight.grad is not None and weight.grad.isnan().all()
