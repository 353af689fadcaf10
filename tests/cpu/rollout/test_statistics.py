"""The metrics of a rollout, on samples small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest

from miles.data.sample import Sample, SampleStatus, SpecInfo
from miles.rollout.filters import check_no_aborted, check_reward_nonzero_std
from miles.rollout.statistics import has_repetition, rollout_metrics


def sample(
    length: int = 2,
    reward: float | dict[str, float] | None = 0.0,
    status: SampleStatus = SampleStatus.COMPLETED,
    versions: tuple[int, ...] = (1,),
    cached: int | None = None,
) -> Sample:
    return Sample(
        prompt="p",
        tokens=[1] * (3 + length),
        response="ab",
        response_length=length,
        reward=reward,  # type: ignore[arg-type]
        status=status,
        rollout_log_probs=np.zeros(length, dtype=np.float32),
        weight_versions=[(version, i) for i, version in enumerate(versions)],
        cached_tokens=cached,
    )


def test_lengths_truncation_and_versions() -> None:
    groups = [
        [sample(2), sample(4, status=SampleStatus.TRUNCATED, versions=(3, 4))],
        [sample(6), sample(9, versions=(2,))],
    ]
    metrics = rollout_metrics(groups)
    names = ("mean", "median", "max", "min")
    assert [metrics[f"rollout/response_len/{name}"] for name in names] == [5.25, 5.0, 9.0, 2.0]
    assert metrics["rollout/truncated_ratio"] == 0.25
    assert [metrics[f"rollout/weight_version/{name}"] for name in names] == [2.2, 2.0, 4.0, 1.0]
    assert metrics["rollout/weight_version/mixed_version_ratio"] == 0.25


def test_rewards_and_groups_without_spread() -> None:
    groups = [[sample(reward=r) for r in rewards] for rewards in ([0, 0], [1, 1], [1, 0], [0.5, 0.5])]
    metrics = rollout_metrics(groups)
    assert metrics["rollout/raw_reward"] == 0.5
    assert metrics["rollout/none_reward_ratio"] == 0
    assert metrics["rollout/zero_std/fraction"] == 0.75
    assert metrics["rollout/zero_std/all_zero_percentage"] == 0.25
    assert metrics["rollout/zero_std/all_one_percentage"] == 0.25
    assert metrics["rollout/zero_std/count_0.5"] == 1


def test_a_reward_key_chooses_from_dict_rewards() -> None:
    groups = [[sample(reward={"acc": 1.0, "score": -1.0}), sample(reward={"acc": 0.0, "score": -1.0})]]
    assert rollout_metrics(groups, "acc")["rollout/raw_reward"] == 0.5
    assert rollout_metrics(groups, "score")["rollout/zero_std/fraction"] == 1


def test_missing_rewards_are_counted_and_not_taken_for_zero() -> None:
    metrics = rollout_metrics([[sample(reward=None), sample(reward=1.0)], [sample(reward=1.0)]])
    assert metrics["rollout/none_reward_ratio"] == pytest.approx(1 / 3)
    assert metrics["rollout/raw_reward"] == 1.0
    assert metrics["rollout/zero_std/fraction"] == 1.0, "of the one group that is scored whole"
    unscored = rollout_metrics([[sample(reward=None)]])
    assert not [name for name in unscored if "zero_std" in name or "raw_reward" in name]


def test_what_was_not_recorded_is_absent() -> None:
    metrics = rollout_metrics([[sample(versions=())]])
    assert not [name for name in metrics if "weight_version" in name or "cache" in name]
    cached = rollout_metrics([[sample(cached=0), sample(cached=3)]])
    assert cached["rollout/prefix_cache_hit_rate"] == 0.5
    assert cached["rollout/avg_cached_tokens_per_sample"] == 1.5
    assert rollout_metrics([]) == {}


def test_repetition_is_a_tail_that_compresses_more_than_tenfold() -> None:
    varied = "".join(chr(97 + int(c)) for c in np.random.default_rng(0).integers(0, 26, 3000))
    assert has_repetition("the same again " * 200)
    assert has_repetition(varied + "x" * 20_000)
    assert not has_repetition(varied)
    assert not has_repetition("x" * 30)


def test_the_stock_filters_name_their_reason() -> None:
    keep = check_reward_nonzero_std()
    assert keep([sample(reward=1.0), sample(reward=0.0)]) is None
    assert keep([sample(reward=1.0), sample(reward=1.0)]) == "zero_std_1"
    assert keep([sample(reward=0.0), sample(reward=None)]) == "none_reward"
    assert check_no_aborted([sample(), sample(status=SampleStatus.ABORTED)]) == "aborted"
    assert check_no_aborted([sample()]) is None


def test_speculation_is_averaged_over_samples_and_by_depth_over_guesses() -> None:
    """Two accepted of three guesses in two verifications, and none of two in one."""
    one, other, plain = sample(5), sample(2), sample(2)
    one.spec_info = SpecInfo(
        accepted_tokens=2, draft_tokens=3, verify_steps=2, tried=[2, 1, 0], accepted=[2, 0, 0]
    )
    other.spec_info = SpecInfo(
        accepted_tokens=0, draft_tokens=2, verify_steps=1, tried=[1, 0], accepted=[0, 0]
    )
    metrics = rollout_metrics([[one, other, plain]])
    assert metrics["rollout/spec_accept_length"] == pytest.approx((2 + 1) / 2)
    assert metrics["rollout/spec_accept_rate"] == pytest.approx((2 / 3 + 0) / 2)
    assert metrics["rollout/spec_accept_rate/depth_1"] == pytest.approx(2 / 3)
    assert metrics["rollout/spec_accept_rate/depth_2"] == 0
    assert "rollout/spec_accept_rate/depth_3" not in metrics
    assert not any("spec" in name for name in rollout_metrics([[plain]]))


def test_counters_of_a_response_in_parts_add_up() -> None:
    whole = SpecInfo(1, 2, 3, [2, 1], [1, 0]).plus(SpecInfo(4, 5, 6, [3], [3]))
    assert whole == SpecInfo(5, 7, 9, [5, 1], [4, 0])
