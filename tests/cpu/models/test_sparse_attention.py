"""Heads with keys and values of their own attend to the keys that an indexer chooses."""

from __future__ import annotations

import pytest
import torch

from miles.arch.spec import IndexerSpec
from miles.models import sparse_attention
from miles.models.sparse_attention import attend_heads_to_chosen

LENGTH, TOP_K = 13, 4


def by_hand(q, keys, values, index_q, index_keys, index_weights):
    """Of one sequence and query by query: q, keys [H, S, d], values [H, S, v], index_q [h, S, e]."""
    rows = []
    for position in range(LENGTH):
        seen = slice(position + 1)
        scores = torch.relu(index_q[:, position] @ index_keys[seen].t()) * index_q.shape[-1] ** -0.5
        total = (index_weights[:, position, None] * scores).sum(0) * len(index_q) ** -0.5
        chosen = total.topk(min(TOP_K, position + 1)).indices
        logits = (keys[:, chosen] @ q[:, position, :, None]).squeeze(-1) * q.shape[-1] ** -0.5
        rows.append((torch.softmax(logits, -1)[:, None] @ values[:, chosen]).squeeze(1))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("block", [5, LENGTH])
def test_chosen_keys_and_gradients_are_those_by_hand(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block of queries, and in several that are computed again in backward."""
    monkeypatch.setattr(sparse_attention, "QUERY_BLOCK", block)
    torch.manual_seed(0)
    q, keys, values = (torch.randn(2, 3, LENGTH, width, requires_grad=True) for width in (6, 6, 4))
    index = torch.randn(2, 9, LENGTH, 5), torch.randn(2, LENGTH, 5), torch.randn(2, 9, LENGTH)
    weighting = torch.randn(2, 3, LENGTH, 4)
    found = []
    for out in (
        attend_heads_to_chosen(q, keys, values, *index, IndexerSpec(9, 5, TOP_K)),
        torch.stack([by_hand(*one) for one in zip(q, keys, values, *index, strict=True)]),
    ):
        found.append((out, *torch.autograd.grad((out * weighting).sum(), (q, keys, values))))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
