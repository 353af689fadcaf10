"""Which keys an indexer chooses, where many score alike."""

from __future__ import annotations

import torch

from miles.arch.spec import IndexerSpec
from miles.models.exact_sparse import Index


def test_of_keys_that_score_alike_the_earliest_are_chosen_in_any_width() -> None:
    """One head whose products are the keys themselves: two are liked, the others score 0 after the relu."""
    keys = torch.full((1, 48, 1), -1.0)
    keys[0, [7, 20], 0] = torch.tensor([1.0, 3.0])
    ones = torch.ones(1, 1, 1, 1)
    for width in (32, 48):
        mask = torch.zeros(1, 1, width)
        mask[..., 30:] = float("-inf")
        chosen = Index(ones, keys[:, :width], ones[..., 0]).choice(mask, IndexerSpec(1, 1, top_k=5))
        assert chosen.flatten().eq(0).nonzero().flatten().tolist() == [0, 1, 2, 7, 20]


def test_where_fewer_are_seen_than_may_be_chosen_all_are() -> None:
    mask = torch.zeros(1, 1, 16)
    mask[..., 3:] = float("-inf")
    ones = torch.ones(1, 1, 1, 1)
    index = Index(ones, torch.randn(1, 16, 1), ones[..., 0])
    assert torch.equal(index.choice(mask, IndexerSpec(1, 1, top_k=9)), mask)
