"""Packing keeps every row beside the token, target, route and log-prob it belongs to."""

from __future__ import annotations

import numpy as np
import pytest

from miles.data.batch import TrainBatch, pack
from miles.data.sample import Sample, SampleStatus
from miles.errors import DataError


def sample(index: int, prompt: int, response: int, **changes: object) -> Sample:
    n = prompt + response
    made = Sample(
        prompt="p",
        tokens=[100 * index + t for t in range(n)],
        response_length=response,
        status=SampleStatus.COMPLETED,
        # Values that name what they speak of: -t/100 for the log-prob of token t, t for the route of row t.
        rollout_log_probs=-np.arange(prompt, n, dtype=np.float32) / 100,
        rollout_routed_experts=np.arange(n - 1, dtype=np.int16)[:, None, None].repeat(2, 1).repeat(3, 2),
        reward=float(index),
        index=index,
        group_index=index // 2,
        rollout_id=index,
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_a_sample_of_n_tokens_gives_n_minus_1_aligned_rows() -> None:
    batch = pack([sample(1, prompt=3, response=2, loss_mask=[0, 1])])
    assert batch.tokens.tolist() == [100, 101, 102, 103]
    assert batch.targets.tolist() == [101, 102, 103, 104]
    assert batch.positions.tolist() == [0, 1, 2, 3]
    assert batch.loss_mask.tolist() == [0, 0, 0, 1]
    np.testing.assert_allclose(batch.rollout_log_probs, [np.nan, np.nan, -0.03, -0.04])
    assert batch.routes is not None
    assert batch.routes[:, 0, 0].tolist() == [0, 1, 2, 3]
    assert batch.response_lengths.tolist() == [2]


def test_sequences_follow_one_another() -> None:
    batch = pack([sample(1, 2, 2), sample(2, 1, 4), sample(3, 4, 1)])
    assert batch.cu_seqlens.tolist() == [0, 3, 7, 11]
    assert batch.num_tokens == 11
    assert batch.num_sequences == 3
    assert batch.lengths.tolist() == [3, 4, 4]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3]
    assert batch.sequence_ids.tolist() == [0] * 3 + [1] * 4 + [2] * 4
    assert batch.loss_mask.tolist() == [0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1]
    assert batch.rewards.tolist() == [1, 2, 3]
    assert batch.group_index.tolist() == [0, 1, 1]


def test_absent_things_are_marked_absent() -> None:
    bare = Sample(prompt="p", tokens=[1, 2, 3], response_length=1, status=SampleStatus.TRUNCATED)
    batch = pack([bare, sample(1, 1, 1)])
    assert np.isnan(batch.rollout_log_probs[:2]).all()
    assert np.isnan(batch.rewards[0])
    assert batch.sample_index.tolist() == [-1, 1]
    assert batch.routes is not None
    assert (batch.routes[:2] == -1).all()
    assert pack([bare]).routes is None


def test_a_removed_sample_keeps_its_rows_but_trains_none() -> None:
    batch = pack([sample(1, 2, 3, remove_sample=True), sample(2, 2, 3)])
    assert batch.num_sequences == 2
    assert batch.loss_mask.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]


def test_select_gives_what_packing_those_samples_gives() -> None:
    rng = np.random.default_rng(0)
    samples = [sample(i, int(rng.integers(1, 6)), int(rng.integers(1, 6))) for i in range(12)]
    whole = pack(samples)
    whole = whole.with_rows(advantages=np.arange(whole.num_tokens, dtype=np.float32))
    for _ in range(20):
        picked = rng.permutation(12)[: rng.integers(1, 13)].tolist()
        part, expected = whole.select(picked), pack([samples[i] for i in picked])
        part.validate()
        for name in vars(expected):
            if name != "advantages":
                np.testing.assert_array_equal(getattr(part, name), getattr(expected, name), err_msg=name)
        rows = np.concatenate([np.arange(whole.cu_seqlens[i], whole.cu_seqlens[i + 1]) for i in picked])
        np.testing.assert_array_equal(part.advantages, rows)


def test_dict_rewards_are_selected_by_key() -> None:
    batch = pack([sample(1, 1, 1, reward={"a": 2, "b": None})], reward_key="a")
    assert batch.rewards.tolist() == [2]
    assert np.isnan(pack([sample(1, 1, 1, reward={"a": 2, "b": None})], reward_key="b").rewards).all()


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        pack([])
    with pytest.raises(DataError, match="fewer than two tokens"):
        pack([Sample(prompt="p", tokens=[1])])
    with pytest.raises(DataError, match="loss_mask"):
        pack([sample(1, 2, 2, loss_mask=[1])])
    other_model = sample(2, 1, 1, rollout_routed_experts=np.zeros((1, 5, 3), dtype=np.int16))
    with pytest.raises(DataError, match="different shapes"):
        pack([sample(1, 1, 1), other_model])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("advantages", np.zeros(3, dtype=np.float32), "3 entries"),
        ("advantages", np.zeros(4), "float64"),
        ("targets", np.zeros(4, dtype=np.int64), "next inputs"),
        ("positions", np.arange(1, 5), "count from 0"),
    ],
)
def test_a_broken_batch_does_not_pass(field: str, value: np.ndarray, message: str) -> None:
    batch: TrainBatch = pack([sample(1, 3, 2)])
    with pytest.raises(AssertionError, match=message):
        batch.with_rows(**{field: value})
