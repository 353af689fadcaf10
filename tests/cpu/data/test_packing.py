"""Micro-batches lose no sequence, double none, and stay within the token budget."""

from __future__ import annotations

import numpy as np
import pytest

from miles.data.packing import fixed_micro_batches, group_micro_batches, micro_batches


@pytest.mark.parametrize("seed", range(25))
def test_every_sequence_lands_in_exactly_one_batch_within_the_budget(seed: int) -> None:
    rng = np.random.default_rng(seed)
    budget = int(rng.integers(1, 200))
    lengths = rng.integers(1, 250, size=int(rng.integers(0, 80))).tolist()
    batches = micro_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert sum(lengths[i] for i in batch) <= budget or len(batch) == 1
    assert batches == micro_batches(lengths, budget)


@pytest.mark.parametrize("seed", range(25))
def test_a_prompt_counts_once_in_a_batch_of_groups(seed: int) -> None:
    rng = np.random.default_rng(seed)
    budget = int(rng.integers(20, 200))
    groups = rng.integers(0, 6, size=int(rng.integers(0, 60))).tolist()
    prompts = [3 + 4 * group for group in groups]
    lengths = [prompt + int(rng.integers(0, 60)) for prompt in prompts]
    batches = group_micro_batches(lengths, prompts, groups, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        own = sum(lengths[i] - prompts[i] for i in batch)
        assert own + sum(3 + 4 * g for g in {groups[i] for i in batch}) <= budget or len(batch) == 1


def test_a_group_that_fits_stays_together() -> None:
    groups = [0, 1, 0, 1, 0, 1]
    assert group_micro_batches([12] * 6, [10] * 6, groups, max_tokens=16) == [[0, 2, 4], [1, 3, 5]]
    assert group_micro_batches([12] * 6, [10] * 6, groups, max_tokens=14) == [[0, 2], [1, 3], [4], [5]]


def test_an_overlong_sequence_is_alone() -> None:
    assert micro_batches([3, 50, 3], max_tokens=10) == [[0, 2], [1]]


def test_budgets_are_filled() -> None:
    # First fit decreasing is within 11/9 of the optimum, plus one bin (Johnson 1973); the optimum is 20.
    assert len(micro_batches([6, 4, 5, 5] * 10, max_tokens=10)) == 20


def test_order_is_by_first_index() -> None:
    assert micro_batches([1, 9, 9, 1], max_tokens=10) == [[0, 1], [2, 3]]


def test_fixed_batches_are_consecutive() -> None:
    assert fixed_micro_batches(5, 2) == [[0, 1], [2, 3], [4]]
    assert fixed_micro_batches(0, 2) == []


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        micro_batches([1], 0)
    with pytest.raises(ValueError, match="positive"):
        fixed_micro_batches(1, 0)
