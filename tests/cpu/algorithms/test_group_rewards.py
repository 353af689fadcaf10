"""Rewards are normalised inside a prompt group, one reward per rollout."""

from __future__ import annotations

import pytest
import torch

from miles.algorithms.group_rewards import choose_baseline, normalize_group_rewards
from miles.errors import DataError


def values(rewards, groups=None, rollouts=None, baseline="mean_std"):
    groups = groups or [0] * len(rewards)
    rollouts = rollouts or list(range(len(rewards)))
    return normalize_group_rewards(rewards, groups, rollouts, baseline)


def test_mean_and_sample_standard_deviation_with_epsilon() -> None:
    result = values([1.0, 0.0, 0.0, 3.0])
    raw = torch.tensor([1.0, 0.0, 0.0, 3.0])
    expected = (raw - raw.mean()) / (raw.std(unbiased=True) + 1e-6)
    torch.testing.assert_close(result.values_N, expected)


def test_the_epsilon_keeps_a_tiny_spread_from_blowing_up() -> None:
    result = values([0.0, 2e-6])
    deviation = 2e-6 / 2**0.5
    assert result.values_N[1].item() == pytest.approx(1e-6 / (deviation + 1e-6), rel=1e-4)


def test_groups_do_not_see_each_other() -> None:
    both = values([1.0, 0.0, 5.0, 9.0], groups=["a", "b", "a", "b"])
    torch.testing.assert_close(both.values_N[::2], values([1.0, 5.0]).values_N)
    torch.testing.assert_close(both.values_N[1::2], values([0.0, 9.0]).values_N)
    assert both.num_groups == 2


def test_siblings_count_once() -> None:
    result = values([1.0, 1.0, 1.0, 0.0], rollouts=[7, 7, 7, 8])
    pair = values([1.0, 0.0]).values_N
    torch.testing.assert_close(result.values_N, pair[[0, 0, 0, 1]])


def test_siblings_must_share_their_reward() -> None:
    with pytest.raises(DataError, match="rollout 7"):
        values([1.0, 0.5], rollouts=[7, 7])


def test_a_missing_reward_takes_no_part() -> None:
    result = values([1.0, None, 0.0])
    assert result.included_N.tolist() == [True, False, True]
    torch.testing.assert_close(result.values_N[[0, 2]], values([1.0, 0.0]).values_N)


@pytest.mark.parametrize("baseline", ["mean", "mean_std", "leave_one_out"])
@pytest.mark.parametrize("rewards", [[0.1] * 3, [0.7]])
def test_a_flat_group_gives_exactly_zero(baseline: str, rewards: list[float]) -> None:
    result = values(rewards, baseline=baseline)
    assert result.values_N.tolist() == [0.0] * len(rewards)
    assert result.num_flat_groups == 1


def test_leave_one_out_subtracts_the_mean_of_the_others() -> None:
    result = values([1.0, 0.0, 5.0], baseline="leave_one_out")
    torch.testing.assert_close(result.values_N, torch.tensor([1 - 2.5, 0 - 3.0, 5 - 0.5]))


def test_the_two_switches_take_parts_of_the_baseline_away() -> None:
    off = {"disable_rewards_normalization": False, "disable_std_normalization": False}
    assert choose_baseline("mean_std", **off) == "mean_std"
    assert choose_baseline("mean_std", **off | {"disable_std_normalization": True}) == "mean"
    assert choose_baseline("mean_std", **off | {"disable_rewards_normalization": True}) == "none"
    assert choose_baseline("leave_one_out", **off | {"disable_std_normalization": True}) == "leave_one_out"
    assert values([1.0, 3.0], baseline="none").values_N.tolist() == [1.0, 3.0]
    assert values([1.0, 3.0], baseline="mean").values_N.tolist() == [-1.0, 1.0]
