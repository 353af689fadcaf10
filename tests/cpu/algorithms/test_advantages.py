"""From a reward per sequence to an advantage per token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from miles.algorithms.advantages import ESTIMATORS, AdvantageRows, whiten
from miles.algorithms.sequences import Sequences

MASK = [[0, 1, 1, 0, 1], [1, 1], [0, 0, 0]]
REWARDS = [2.0, -1.0, 4.0]


def make_rows(kl_coef: float = 0.0, gamma: float = 1.0) -> tuple[AdvantageRows, torch.Tensor]:
    mask = torch.tensor([m for row in MASK for m in row], dtype=torch.float32)
    sequences = Sequences(torch.tensor([0, 5, 7, 10]))
    kl = torch.arange(10.0) / 10
    rows = AdvantageRows(torch.tensor(REWARDS), mask, sequences, kl if kl_coef else None, kl_coef, gamma)
    return rows, kl


def reference_returns(kl: torch.Tensor, kl_coef: float, gamma: float) -> list[float]:
    """G_t by the definition, one sequence and one token at a time."""
    out: list[float] = []
    start = 0
    for mask, reward in zip(MASK, REWARDS, strict=True):
        steps = [t for t, m in enumerate(mask) if m]
        returns = [0.0] * len(mask)
        following = 0.0
        for t in reversed(steps):
            earned = -kl_coef * float(kl[start + t]) + (reward if t == steps[-1] else 0.0)
            following = earned + gamma * following
            returns[t] = following
        out += returns
        start += len(mask)
    return out


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "rloo", "dr_grpo"])
def test_the_reward_is_broadcast_over_trained_tokens(name: str) -> None:
    rows, _ = make_rows()
    assert ESTIMATORS[name].spread(rows).tolist() == [0, 2, 2, 0, 2, -1, -1, 0, 0, 0]


@pytest.mark.parametrize(("kl_coef", "gamma"), [(0.0, 1.0), (0.3, 1.0), (0.3, 0.5), (0.0, 0.9)])
def test_reinforce_plus_plus_returns_follow_their_definition(kl_coef: float, gamma: float) -> None:
    rows, kl = make_rows(kl_coef, gamma)
    expected = torch.tensor(reference_returns(kl, kl_coef, gamma))
    torch.testing.assert_close(ESTIMATORS["reinforce_plus_plus"].spread(rows), expected)


@pytest.mark.parametrize(
    ("kl_coef", "gamma", "lambd"), [(0.0, 1.0, 1.0), (0.3, 1.0, 0.95), (0.3, 0.9, 0.5), (0.0, 0.9, 0.0)]
)
def test_generalised_advantages_follow_the_recursion(kl_coef: float, gamma: float, lambd: float) -> None:
    """Masked tokens are no steps, whatever their values; every sequence ends in a state of value 0."""
    rows, kl = make_rows(kl_coef, gamma)
    values = torch.linspace(-1.0, 2.0, 10).masked_fill(rows.loss_mask_T == 0, torch.nan)
    expected: list[float] = []
    start = 0
    for mask, reward in zip(MASK, REWARDS, strict=True):
        steps = [t for t, m in enumerate(mask) if m]
        advantages, following, next_value = [0.0] * len(mask), 0.0, 0.0
        for t in reversed(steps):
            earned = -kl_coef * float(kl[start + t]) + (reward if t == steps[-1] else 0.0)
            delta = earned + gamma * next_value - float(values[start + t])
            following = delta + gamma * lambd * following
            advantages[t], next_value = following, float(values[start + t])
        expected += advantages
        start += len(mask)
    spread = ESTIMATORS["ppo"].spread(replace(rows, values_T=values, lambd=lambd))
    torch.testing.assert_close(spread, torch.tensor(expected))


def test_with_lambda_1_advantages_and_values_add_up_to_the_discounted_return() -> None:
    rows, _ = make_rows(0.3, 0.9)
    values = torch.linspace(-1.0, 2.0, 10)
    returns = ESTIMATORS["ppo"].spread(replace(rows, values_T=values)) + values * rows.loss_mask_T
    torch.testing.assert_close(returns, ESTIMATORS["reinforce_plus_plus"].spread(rows))


def test_reinforce_plus_plus_baseline_subtracts_each_tokens_own_kl() -> None:
    rows, kl = make_rows(kl_coef=0.5)
    expected = (torch.tensor([2.0] * 5 + [-1.0] * 2 + [4.0] * 3) - 0.5 * kl) * rows.loss_mask_T
    torch.testing.assert_close(ESTIMATORS["reinforce_plus_plus_baseline"].spread(rows), expected)


def test_whitening_sees_trained_tokens_only() -> None:
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    advantages = torch.tensor([1.0, 50.0, 2.0, 6.0, -9.0])
    white = whiten(advantages, mask)
    kept = torch.tensor([1.0, 2.0, 6.0])
    expected = (kept - kept.mean()) / torch.sqrt(kept.var(unbiased=True) + 1e-8)
    torch.testing.assert_close(white[mask > 0], expected)
    assert white[mask == 0].tolist() == [0.0, 0.0]


def test_each_estimator_keeps_the_baseline_and_objective_of_its_paper() -> None:
    shape = {name: (e.baseline, e.objective) for name, e in ESTIMATORS.items()}
    assert shape == {
        "grpo": ("mean_std", "clip"),
        "gspo": ("mean_std", "sequence_clip"),
        "cispo": ("mean_std", "cispo"),
        "dr_grpo": ("mean", "clip"),
        "rloo": ("leave_one_out", "clip"),
        "ppo": ("none", "clip"),
        "reinforce_plus_plus": ("none", "clip"),
        "reinforce_plus_plus_baseline": ("mean", "clip"),
    }
