"""A sample says when it is broken, and survives a record."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from miles.data.sample import Sample, SampleStatus, SpecInfo, validate_samples
from miles.errors import DataError


def completed(**changes: object) -> Sample:
    sample = Sample(
        prompt="2+2=",
        tokens=[5, 6, 7, 8, 9],
        response="4",
        response_length=2,
        status=SampleStatus.COMPLETED,
        rollout_log_probs=np.array([-0.5, -0.25], dtype=np.float32),
        rollout_routed_experts=np.arange(16, dtype=np.int16).reshape(4, 2, 2),
        weight_versions=[(3, 0), (4, 1)],
        index=7,
        group_index=2,
    )
    for name, value in changes.items():
        setattr(sample, name, value)
    return sample


def test_lengths_follow_from_the_tokens() -> None:
    sample = completed()
    assert (sample.prompt_length, sample.response_length, sample.num_rows) == (3, 2, 4)
    assert sample.trained_tokens == 2
    assert completed(loss_mask=[1, 0]).trained_tokens == 1
    assert completed(remove_sample=True).trained_tokens == 0
    assert sample.oldest_weight_version == 3


def test_a_whole_sample_and_an_untouched_prompt_are_valid() -> None:
    completed().validate()
    Sample(prompt="hello").validate()
    Sample(prompt="hello", tokens=[1, 2]).validate()


BROKEN: list[tuple[str, dict[str, object]]] = [
    ("5 tokens hold a response of 5", {"response_length": 5}),
    ("not negative", {"tokens": [5, -6, 7, 8, 9]}),
    ("status is 'done'", {"status": "done"}),
    ("completed sample without a response", {"tokens": [5], "response_length": 0}),
    ("pending sample with 2", {"status": SampleStatus.PENDING}),
    ("loss_mask has 3 entries for 2", {"loss_mask": [1, 1, 1]}),
    ("other than 0 and 1", {"loss_mask": [1, 2]}),
    ("float64", {"rollout_log_probs": np.array([-0.5, -0.25])}),
    ("is list", {"rollout_log_probs": [-0.5, -0.25]}),
    (r"shape \(3,\)", {"rollout_log_probs": np.zeros(3, dtype=np.float32)}),
    ("infinity", {"rollout_log_probs": np.array([-np.inf, -1], dtype=np.float32)}),
    ("positive value", {"rollout_log_probs": np.array([0.1, -1], dtype=np.float32)}),
    (
        "response token 1 is trained on but its log-prob is NaN",
        {"rollout_log_probs": np.array([-1, np.nan], dtype=np.float32)},
    ),
    (r"it must be \(4, 2, 2\)", {"rollout_routed_experts": np.zeros((5, 2, 2), dtype=np.int16)}),
    ("int32", {"rollout_routed_experts": np.zeros((4, 2, 2), dtype=np.int32)}),
    (r"\[rows, MoE layers, top-k\]", {"rollout_routed_experts": np.zeros((4, 2), dtype=np.int16)}),
    ("expert id -2", {"rollout_routed_experts": np.full((4, 2, 2), -2, dtype=np.int16)}),
    ("ascend from token 0", {"weight_versions": [(3, 1)]}),
    ("ascend from token 0", {"weight_versions": [(3, 0), (4, 0)]}),
    ("starts at token 2 of 2", {"weight_versions": [(3, 0), (4, 2)]}),
    ("reward is nan", {"reward": float("nan")}),
]


@pytest.mark.parametrize(("message", "changes"), BROKEN, ids=[m for m, _ in BROKEN])
def test_every_broken_invariant_is_named(message: str, changes: dict[str, object]) -> None:
    with pytest.raises(DataError, match=message) as error:
        completed(**changes).validate()
    assert error.value.where == "sample 7 (group 2)"
    assert error.value.why


@pytest.mark.parametrize(("message", "changes"), BROKEN, ids=[m for m, _ in BROKEN])
def test_one_broken_sample_among_sound_ones_is_named(message: str, changes: dict[str, object]) -> None:
    untouched = Sample(prompt="hello", tokens=[1, 2])
    validate_samples([completed(), untouched])
    with pytest.raises(DataError, match=message):
        validate_samples([completed(), untouched, completed(**changes)])


@pytest.mark.parametrize(("message", "changes"), BROKEN, ids=[m for m, _ in BROKEN])
def test_the_quick_look_at_a_plain_response_lets_nothing_broken_pass(
    message: str, changes: dict[str, object]
) -> None:
    plain: dict[str, object] = {"weight_versions": [(3, 0)], "reward": 1.0}
    completed(**plain).validate()
    with pytest.raises(DataError, match=message):
        completed(**plain | changes).validate()


def test_nan_is_the_mark_of_a_token_that_was_not_sampled() -> None:
    log_probs = np.array([np.nan, -0.25], dtype=np.float32)
    completed(rollout_log_probs=log_probs, loss_mask=[0, 1]).validate()
    completed(rollout_log_probs=log_probs, remove_sample=True).validate()


def test_dict_rewards_need_a_key() -> None:
    sample = completed(reward={"accuracy": 1, "format": None})
    assert sample.reward_value("accuracy") == 1.0
    assert sample.reward_value("format") is None
    for key in (None, "speed"):
        with pytest.raises(DataError, match="accuracy, format") as error:
            sample.reward_value(key)
        assert "--reward-key" in error.value.fix


@pytest.mark.parametrize(
    "change",
    [
        lambda s: None,
        lambda s: setattr(s, "spec_info", SpecInfo(accepted_tokens=3, draft_tokens=5, verify_steps=2)),
        lambda s: setattr(s, "reward", {"accuracy": 0.5}),
        lambda s: setattr(s, "prompt", [{"role": "user", "content": "hi"}]),
    ],
)
def test_a_record_gives_the_same_sample_back(change: Callable[[Sample], None]) -> None:
    sample = completed(loss_mask=[0, 1], rollout_log_probs=np.array([np.nan, -0.3], dtype=np.float32))
    change(sample)
    again = Sample.from_dict(json.loads(json.dumps(sample.to_dict(), allow_nan=False)))
    again.validate()
    assert again.to_dict() == sample.to_dict()
    assert again.status is SampleStatus.COMPLETED
    np.testing.assert_array_equal(again.rollout_log_probs, sample.rollout_log_probs)
    np.testing.assert_array_equal(again.rollout_routed_experts, sample.rollout_routed_experts)


def test_a_record_can_leave_routes_out() -> None:
    record = completed().to_dict(routes=False)
    assert "rollout_routed_experts" not in record
    assert Sample.from_dict(record).rollout_routed_experts is None


def test_an_unknown_field_in_a_record_is_refused() -> None:
    with pytest.raises(DataError, match="rewards"):
        Sample.from_dict({"prompt": "x", "rewards": 1.0})
