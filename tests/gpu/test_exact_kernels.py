"""On a GPU: a row's bits depend on neither the rows beside it nor on zeros behind it."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("triton")
    from miles.models.cuda import kernels

    return kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(512, 1024), (6, 40), (1000, 4096)], ids=str)
def test_a_product_is_the_same_among_any_number_of_rows(shape, dtype, kernels) -> None:
    columns, inner = shape
    generator = torch.Generator("cuda").manual_seed(0)
    rows = torch.randn(1, 777, inner, generator=generator, device="cuda").to(dtype)
    matrix = torch.randn(1, inner, columns, generator=generator, device="cuda").to(dtype)
    together = kernels.bmm(rows, matrix)
    expected = torch.bmm(rows.double(), matrix.double())
    assert (together.double() - expected).abs().max() < (
        0.02 if dtype == torch.bfloat16 else 1e-5
    ) * inner**0.5
    for count in (1, 2, 17, 64, 65, 500):
        for start in (0, 3, 100):
            alone = kernels.bmm(rows[:, start : start + count], matrix)
            assert torch.equal(alone, together[:, start : start + count])


def test_zeros_behind_a_sum_and_masked_keys_change_nothing(kernels) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    scores = torch.randn(3, 5, 4096, generator=generator, device="cuda")
    values = torch.randn(3, 4096, 64, generator=generator, device="cuda")
    for keys in (1, 16, 130, 1500):
        masked = scores.clone()
        masked[..., keys:] = float("-inf")
        wide, narrow = kernels.softmax(masked), kernels.softmax(scores[..., :keys])
        torch.testing.assert_close(narrow, torch.softmax(scores[..., :keys], -1))
        assert torch.equal(wide[..., :keys], narrow) and not wide[..., keys:].any()
        assert torch.equal(kernels.bmm(wide, values), kernels.bmm(narrow, values[:, :keys]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_probe_finds_exact_numerics(dtype) -> None:
    pytest.importorskip("triton")
    from miles.arch import load_spec
    from miles.data.tasks import resolve_builtin
    from miles.models.invariance import find_exact_numerics

    assert find_exact_numerics(load_spec(resolve_builtin("builtin:sort")), dtype, "cuda").name == "exact"
