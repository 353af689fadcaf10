"""The start-up probe finds the padding that this machine needs, or refuses and names the shape."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from alignment_support import QUICKSTART, SPECS

from miles.errors import PreflightRefused
from miles.models import experts as expert_blocks
from miles.models import numerics, row_blocks, row_search
from miles.models.invariance import find_exact_numerics
from miles.models.row_blocks import RowBlocks, blocked_product
from miles.models.row_search import BY_COLUMN, cancelling, find_row_blocks


def test_what_was_found_is_told_in_words(exact) -> None:
    """Of the operations of the model; a dense one has no experts."""
    found = exact(QUICKSTART, torch.float32)
    told = found.chosen()
    assert "in fp32" in told["rows"] and f"at least {found.min_queries} query row" in told["attention"]
    assert told["experts"].endswith("a product per expert")
    batched = RowBlocks((4, 8), torch.bfloat16, batched=(4, 8))
    some = replace(found, blocks={(((2, 4), (4, 2)), torch.bfloat16): batched}).chosen()
    assert some["rows"] == "blocks of 4 to 8 in bf16"
    assert some["experts"] == "equal groups of up to 8 rows in one batched product, else a product per expert"
    dense = replace(found, blocks={(((2, 4),), torch.bfloat16): batched}).chosen()
    assert "experts" not in dense and numerics.FAST.chosen() == {}


def test_every_count_of_rows_gives_the_same_bits(exact) -> None:
    found = exact(QUICKSTART, torch.float32)
    assert found.threads == 1
    generator = torch.Generator().manual_seed(9)
    for outputs, inputs in ((128, 64), (64, 64), (8, 64), (55, 64)):
        weight, rows = (torch.randn(n, inputs, generator=generator) for n in (outputs, 5000))
        together = found.linear(rows, weight)
        assert (together - rows @ weight.t()).abs().max() < 1e-4
        for count in (1, 2, 3, 5, 7, 11, 13, 64, 333, 2047, 2049, 4900):
            assert torch.equal(found.linear(rows[40 : 40 + count], weight), together[40 : 40 + count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(512, 1024), (6, 40), (200, 768)], ids=str)
def test_matrices_whose_kernels_change_in_the_middle_are_cut_between_the_changes(shape, dtype) -> None:
    """On a Xeon with AMX, bf16 products with [512, 1024] have other bits from 33 to 511 rows than beyond."""
    generator = torch.Generator().manual_seed(2)
    blocks = find_row_blocks((shape,), dtype, "cpu", generator)
    assert blocks is not None
    weight = cancelling(*shape, 1.0, generator, torch.device("cpu")).to(dtype)
    rows = cancelling(1500, shape[1], -1.0, generator, torch.device("cpu")).to(dtype)
    together = blocked_product(rows, weight, blocks)
    for count in (1, 17, 32, 33, 100, 200, 480, 511, 512, 1024, 1200):
        assert torch.equal(blocked_product(rows[-count:], weight, blocks), together[-count:]), count


@pytest.mark.parametrize("slow", [True, False])
def test_products_without_vectors_of_their_own_are_computed_in_fp32(slow: bool, monkeypatch) -> None:
    monkeypatch.setattr(row_search, "is_slow", lambda dtype, device: slow)
    blocks = find_row_blocks(((64, 32),), torch.bfloat16, "cpu", torch.Generator().manual_seed(2))
    assert blocks is not None and (not slow or blocks.dtype == torch.float32)
    x, weight = torch.randn(70, 32).bfloat16(), torch.randn(64, 32).bfloat16()
    product = blocked_product(x, weight, blocks)
    assert torch.equal(product[-9:], blocked_product(x[-9:], weight, blocks))
    torch.testing.assert_close(product, (x.float() @ weight.float().t()).bfloat16())


def test_stacked_experts_are_probed_in_the_order_in_which_they_are_stored(exact) -> None:
    kinds = exact(SPECS["llama4"], torch.float32).blocks
    assert [BY_COLUMN in kind for kind in kinds if len(kind[0]) > 1] == [True]
    kinds = exact(QUICKSTART, torch.float32).blocks
    assert [BY_COLUMN in kind for kind in kinds if len(kind[0]) > 1] == [False]


def test_a_step_has_rows_that_every_product_takes(exact) -> None:
    found = exact(QUICKSTART, torch.float32)
    for count in range(1, 70):
        rows = found.step_rows(count)
        assert rows >= count and all(rows in blocks.alone for blocks in found.blocks.values())
    some = replace(found, blocks={0: RowBlocks((4, 6), torch.float32), 1: RowBlocks((4, 8), torch.float32)})
    assert [some.step_rows(count) for count in (1, 4, 5)] == [4, 4, 5], "none shared: as it is"


def test_rows_are_cut_into_probed_counts_and_filled_up() -> None:
    blocks = RowBlocks((4, 16, 64), torch.float32)
    assert [blocks.cut(rows) for rows in (0, 1, 5, 64, 65, 150)] == [
        [],
        [4],
        [16],
        [64],
        [64, 4],
        [64, 64, 64],
    ]


def test_a_library_with_other_kernels_for_few_and_for_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that computes up to 9 and from 300 rows on in another order."""
    replace_products(monkeypatch, lambda x: len(x) <= 9 or len(x) >= 300)
    blocks = find_exact_numerics(QUICKSTART, torch.float32).blocks[((55, 64),), torch.float32]
    assert 9 < blocks.sizes[0] <= 16 and 128 <= blocks.sizes[-1] < 300


@pytest.mark.slow
def test_products_that_depend_on_the_place_in_bf16_are_computed_in_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replace_products(monkeypatch, lambda x: x.dtype == torch.bfloat16, places=lambda x: True)
    blocks = find_exact_numerics(QUICKSTART, torch.bfloat16).blocks
    assert {held.dtype for held in blocks.values()} == {torch.float32}


def test_a_library_that_is_never_invariant_is_refused_by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_products(monkeypatch, lambda x: True, places=lambda x: True)
    with pytest.raises(PreflightRefused, match=r"with \(55, 64\) in"):
        find_exact_numerics(QUICKSTART, torch.float32)


def replace_products(monkeypatch, other_order, places=lambda x: False) -> None:
    """Products with rows that satisfy `other_order` are summed in another one, even before odd inputs; where
    `places` says so, the first row alone."""
    mm = torch.mm

    def product(x, matrix, out=None):
        result = in_other_order(mm, x, matrix)
        if not other_order(x):
            result = mm(x, matrix)
        elif places(x):
            result = torch.cat((result[:1], mm(x, matrix)[1:]))
        return result if out is None else out.copy_(result)

    monkeypatch.setattr(row_blocks, "mm", product)


def in_other_order(product, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [..., K] @ b [..., K, N], the sum over even inputs and that over odd ones each rounded."""
    return product(a[..., ::2], b[..., ::2, :]) + product(a[..., 1::2], b[..., 1::2, :])


def test_batched_products_in_another_order_leave_a_product_per_expert(
    monkeypatch: pytest.MonkeyPatch, exact
) -> None:
    """Experts of equal groups are one batched product, where that was measured to give the same bits."""
    experts = ((128, 64), (64, 64)), torch.float32
    assert exact(QUICKSTART, torch.float32).blocks[experts].batched

    def other_than_alone(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return in_other_order(torch.bmm, a, b)

    monkeypatch.setattr(row_search, "bmm", other_than_alone)
    monkeypatch.setattr(expert_blocks, "bmm", other_than_alone)
    found = find_exact_numerics(QUICKSTART, torch.float32)
    assert found.blocks[experts].sizes and not found.blocks[experts].batched


def test_attention_whose_kernels_change_with_few_queries_computes_more_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A decode step has 2 query rows per key head here; a stand-in sums in another order below 8."""
    from miles.models import exact_sums, path_probe

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.bmm(a, b) if a.shape[1] >= 8 else in_other_order(torch.bmm, a, b)

    for module in (exact_sums, path_probe):
        monkeypatch.setattr(module, "bmm", product)
    assert find_exact_numerics(QUICKSTART, torch.float32).min_queries == 8


def test_attention_that_depends_on_the_width_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sum over all keys, as a plain product takes it, instead of block after block."""
    from miles.models import exact_attention

    def blocks_backwards(p: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.bmm(p.flip(2), v.flip(1)) if v.shape[1] % 256 else torch.bmm(p, v)

    monkeypatch.setattr(exact_attention, "weighted_values", blocks_backwards)
    with pytest.raises(PreflightRefused, match="attention of 4 heads on 2, width 16"):
        find_exact_numerics(QUICKSTART, torch.float32)


def test_a_row_operation_that_depends_on_the_batch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def softmax_over_columns(self, x: torch.Tensor, router: torch.Tensor, scoring: str) -> torch.Tensor:
        return torch.softmax(torch.mm(router, x.t()).float(), 0).t()

    monkeypatch.setattr(numerics.ExactNumerics, "router_scores", softmax_over_columns)
    with pytest.raises(PreflightRefused, match="a block of experts of width 64"):
        find_exact_numerics(QUICKSTART, torch.float32)


def test_cancelling_rows_multiply_to_rounding_alone() -> None:
    """What makes the probe sharp: the exact product is 0."""
    generator = torch.Generator().manual_seed(0)
    one, other = (
        cancelling(n, 65, sign, generator, torch.device("cpu")) for n, sign in ((7, 1.0), (9, -1.0))
    )
    assert (one.double() @ other.double().t()).abs().max() < 1e-12
    assert (one != 0).sum() == 7 * 64
