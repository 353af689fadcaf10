"""The soft overlong punishment, on the samples that are trained on."""

from __future__ import annotations

import numpy as np
import pytest

from miles.data.batch import pack
from miles.data.sample import Sample, SampleStatus
from miles.rewards.shaping import OverlongPenalty, penalize_overlong


def sample(length: int, reward: float | None, **more) -> Sample:
    return Sample(
        "?",
        tokens=[1, *([2] * length)],
        response_length=length,
        reward=reward,
        status=SampleStatus.COMPLETED if reward is not None else SampleStatus.ABORTED,
        rollout_log_probs=np.zeros(length, np.float32),
        **more,
    )


def test_the_penalty_grows_over_the_buffer() -> None:
    penalty = OverlongPenalty(max_len=20, buffer_len=8, factor=0.5)
    lengths = [1, 12, 13, 16, 20, 22]
    expected = [0.0 if n <= 12 else (12 - n) / 8 * 0.5 for n in lengths]
    assert [penalty.of(n) for n in lengths] == pytest.approx(expected)
    assert penalty.of(20) == -0.5


def test_the_shaped_reward_is_trained_on_and_the_raw_one_stays() -> None:
    samples = [sample(4, 1.0), sample(8, 1.0), sample(10, 0.0)]
    metrics = penalize_overlong(samples, OverlongPenalty(10, 4))
    assert [s.reward for s in samples] == [1.0, 1.0, 0.0]
    assert pack(samples).rewards.tolist() == [1.0, 0.5, -1.0]
    assert [s.to_dict()["shaped_reward"] for s in samples] == [1.0, 0.5, -1.0]
    assert metrics == {"rollout/overlong_penalty": -0.5, "rollout/overlong_frac": pytest.approx(2 / 3)}


def test_a_table_is_shaped_at_its_key() -> None:
    table = sample(10, 0.0)
    table.reward = {"score": 2.0, "acc": 1.0}
    penalize_overlong([table], OverlongPenalty(10, 4), "score")
    assert pack([table], "score").rewards.tolist() == [1.0]


def test_samples_of_one_rollout_share_the_penalty_of_the_longest() -> None:
    samples = [sample(10, 1.0, rollout_id=3), sample(4, 1.0, rollout_id=3), sample(4, 1.0, rollout_id=4)]
    penalize_overlong(samples, OverlongPenalty(10, 4))
    assert [s.shaped_reward for s in samples] == [0.0, 0.0, 1.0]


def test_what_has_no_reward_gets_none() -> None:
    (lost,) = samples = [sample(10, None)]
    assert penalize_overlong(samples, OverlongPenalty(10, 4)) == {}
    assert lost.shaped_reward is None
