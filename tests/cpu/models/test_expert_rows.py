"""How the rows of routed experts are laid out: each group filled up alone, or all to one width."""

from __future__ import annotations

import pytest
import torch

from miles.models.expert_rows import CALL_MULTIPLY_ADDS, ExpertRows, filled_rows, sorted_rows
from miles.models.experts import ExpertKernels, routed_experts
from miles.models.row_blocks import RowBlocks

SIZES = (4, 8, 12, 16, 64)
BLOCKS = RowBlocks(SIZES, torch.float32, batched=(8, 16))
IDS = torch.tensor([[3, 0], [0, 1], [3, 1], [0, 3], [1, 0], [3, 0]])
"""Five tokens of expert 0, three of 1, none of 2, four of 3."""


def check_places(rows: ExpertRows, ids: torch.Tensor) -> None:
    """Every (token, slot) has a row of its own, of its token, in the group of its expert."""
    assert len(set(rows.place.tolist())) == ids.numel()
    assert rows.tokens[rows.place].view_as(ids).tolist() == [[t] * ids.shape[1] for t in range(len(ids))]
    if rows.width is not None:
        group = rows.place // rows.width
    else:
        group = torch.searchsorted(rows.ends.long(), rows.place, right=True)
    assert torch.equal(group.view_as(ids), ids)


@pytest.mark.parametrize("ids", [IDS, IDS[:1], torch.randint(0, 4, (500, 3))], ids=["few", "one", "many"])
def test_every_pair_of_token_and_slot_has_its_row(ids: torch.Tensor) -> None:
    for rows in (sorted_rows(ids, 4), filled_rows(ids, 4, BLOCKS), filled_rows(ids, 4, BLOCKS, 1)):
        check_places(rows, ids)


def test_groups_are_filled_up_alone_and_stay_empty() -> None:
    rows = filled_rows(IDS, 4, BLOCKS)
    assert rows.ends.tolist() == [8, 12, 12, 16]
    assert rows.cut == [(0, 8), (1, 4), (3, 4)] and rows.width is None


def test_all_groups_have_one_width_where_the_rows_cost_less_than_the_calls() -> None:
    """12 rows become 4 groups of 8: 20 rows more, beside 4 calls."""
    dearest = 4 * CALL_MULTIPLY_ADDS // 20
    assert filled_rows(IDS, 4, BLOCKS, dearest).width == 8
    assert filled_rows(IDS, 4, BLOCKS, dearest + 1).width is None


def test_a_group_longer_than_any_batched_product_is_cut_into_blocks() -> None:
    assert filled_rows(torch.zeros(17, 1, dtype=torch.int64), 4, BLOCKS, 1).cut == [(0, 64)]
    assert filled_rows(IDS, 4, RowBlocks(SIZES, torch.float32), 1).width is None


def test_both_layouts_give_the_same_result() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(6, n, generator=generator) for n in (16, 2))
    gate_up, down = (torch.randn(4, *shape, generator=generator) for shape in ((24, 16), (16, 12)))
    with torch.no_grad():
        equal, alone = (
            routed_experts(x, IDS, weights, gate_up, down, ExpertKernels(blocks, fused_sum=False))
            for blocks in (BLOCKS, RowBlocks(SIZES, torch.float32))
        )
    torch.testing.assert_close(equal, alone, rtol=1e-5, atol=1e-5)
