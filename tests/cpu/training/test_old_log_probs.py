"""Where old and reference log-probs come from, and several optimizer steps per rollout batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from miles.algorithms.losses import PolicyLossSettings
from miles.training.batch_advantages import with_advantages
from miles.training.native.micro_batches import split_optimizer_steps
from miles.training.settings import AlgorithmSettings, OptimizerSettings, TrainerSettings

LEARNING = TrainerSettings(optimizer=OptimizerSettings(lr=3e-3), probe_tokens=0)


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.named_weights()}


@pytest.mark.parametrize("cut", [{}, {"micro_batch_size": 4}])
def test_one_step_per_rollout_needs_no_pass_of_its_own(cut, spec, make_trainer, make_batch) -> None:
    """Taking old log-probs from the training forward gives the bits of computing them first."""
    batch = make_batch(spec, noise=0.2)
    short, long = (make_trainer(spec, replace(LEARNING, **cut)) for _ in range(2))
    old = long.log_probs(batch).log_probs
    taken = short.train_step(batch).metrics
    computed = long.train_step(batch.with_rows(old_log_probs=old)).metrics
    assert taken == computed
    left, right = weights(short), weights(long)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_several_steps_use_the_log_probs_from_before_the_first(spec, make_trainer, make_batch) -> None:
    batch = make_batch(spec)
    trainer, by_hand = (make_trainer(spec, replace(LEARNING, num_steps_per_rollout=3)) for _ in range(2))
    result = trainer.train_step(batch)
    assert trainer.step == 3
    assert len(result.optimizer_steps) == 3
    kls = [step["train/ppo_kl"] for step in result.optimizer_steps]
    assert abs(kls[0]) < 1e-6 < min(abs(kls[1]), abs(kls[2]))
    assert result.metrics["train/ppo_kl"] == pytest.approx(np.mean(kls))

    by_hand.settings = LEARNING
    old = by_hand.log_probs(batch).log_probs
    full, _ = with_advantages(batch.with_rows(old_log_probs=old), LEARNING.algorithm)
    for part in split_optimizer_steps(full, 3):
        by_hand.train_step(part)
    left, right = weights(trainer), weights(by_hand)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_siblings_stay_in_one_optimizer_step(spec, make_batch, with_siblings) -> None:
    batch = with_siblings(make_batch(spec))
    shuffled = batch.select(np.random.default_rng(0).permutation(batch.num_sequences).tolist())
    parts = split_optimizer_steps(shuffled, 4)
    rollouts = [set(part.rollout_ids.tolist()) for part in parts]
    assert sum(part.num_sequences for part in parts) == batch.num_sequences
    assert sum(len(r) for r in rollouts) == len(set().union(*rollouts)) == 6
    assert max(len(r) for r in rollouts) - min(len(r) for r in rollouts) <= 1
    firsts = [list(shuffled.rollout_ids).index(part.rollout_ids[0]) for part in parts]
    assert firsts == sorted(firsts), "rollouts are taken in order"


def test_more_steps_than_rollouts_gives_one_step_each(spec, make_batch) -> None:
    batch = make_batch(spec, num_groups=1, group_size=2)
    assert [part.num_sequences for part in split_optimizer_steps(batch, 5)] == [1, 1]


def test_rollout_log_probs_can_be_the_old_ones(spec, make_trainer, make_batch) -> None:
    """The mismatch metrics still compare with the trainer's own log-probs: they do not become 0."""
    algorithm = AlgorithmSettings(use_rollout_logprobs=True)
    trainer = make_trainer(spec, replace(LEARNING, algorithm=algorithm))
    metrics = trainer.train_step(make_batch(spec, weights_seed=1)).metrics
    assert metrics["train/ppo_kl"] != 0
    assert metrics["train/train_rollout_logprob_abs_diff"] > 0.01


def test_the_gap_to_the_engine_is_measured_before_the_first_update(spec, make_trainer, make_batch) -> None:
    algorithm = AlgorithmSettings(use_rollout_logprobs=True)
    settings = replace(LEARNING, algorithm=algorithm, num_steps_per_rollout=3)
    metrics = make_trainer(spec, settings).train_step(make_batch(spec)).metrics
    assert metrics["train/train_rollout_logprob_abs_diff_max"] < 1e-5
    assert abs(metrics["train/ppo_kl"]) > 1e-5


def test_the_reference_is_loaded_and_read_for_the_kl_loss(spec, make_trainer, make_batch) -> None:
    policy = PolicyLossSettings(kl_loss_coef=0.1, kl_loss_type="k3")
    algorithm = AlgorithmSettings(use_kl_loss=True, policy=policy)
    trainer = make_trainer(spec, replace(LEARNING, algorithm=algorithm))
    trainer.load_weights(trainer.named_weights(), "reference")
    batch = make_batch(spec)
    first = trainer.train_step(batch).metrics
    assert first["train/kl_loss"] == pytest.approx(0, abs=1e-6)
    assert first["rollout/ref_log_probs"] == pytest.approx(first["rollout/log_probs"], abs=1e-5)
    for _ in range(3):
        last = trainer.train_step(batch).metrics
    assert last["train/kl_loss"] > 1e-5


def test_the_reference_follows_the_policy_and_survives_a_checkpoint(
    spec, make_trainer, make_batch, tmp_path
) -> None:
    policy = PolicyLossSettings(kl_loss_coef=0.1, kl_loss_type="k3")
    algorithm = AlgorithmSettings(use_kl_loss=True, policy=policy)
    settings = replace(LEARNING, algorithm=algorithm, replay_routes=False)
    batch, trainer = make_batch(spec), make_trainer(spec, settings)
    trainer.load_weights(make_trainer(spec, seed=5).named_weights(), "reference")
    assert trainer.train_step(batch).metrics["train/kl_loss"] > 1e-4
    trainer.update_reference()
    kept = trainer.log_probs(batch, "reference").log_probs
    np.testing.assert_array_equal(kept, trainer.log_probs(batch).log_probs)
    trainer.train_step(batch)
    (tmp_path / "after").mkdir()
    trainer.save(tmp_path / "after")
    resumed = make_trainer(spec, settings, seed=7)
    resumed.load(tmp_path / "after")
    np.testing.assert_array_equal(resumed.log_probs(batch, "reference").log_probs, kept)
    assert (resumed.log_probs(batch).log_probs != kept).any()


def test_the_kl_penalty_of_reinforce_plus_plus_reads_both_models(spec, make_trainer, make_batch) -> None:
    algorithm = AlgorithmSettings(advantage_estimator="reinforce_plus_plus", kl_coef=0.5)
    batch = make_batch(spec)

    def loss(reference_seed: int) -> float:
        trainer = make_trainer(spec, replace(LEARNING, algorithm=algorithm))
        trainer.load_weights(make_trainer(spec, seed=reference_seed).named_weights(), "reference")
        return trainer.train_step(batch).metrics["train/grad_norm"]

    assert loss(0) != pytest.approx(loss(8), rel=1e-3)


def test_log_probs_are_absent_where_nothing_is_trained(spec, make_trainer, make_batch) -> None:
    batch = make_batch(spec)
    result = make_trainer(spec).log_probs(batch)
    np.testing.assert_array_equal(np.isnan(result.log_probs), batch.loss_mask == 0)
    np.testing.assert_allclose(
        result.log_probs[batch.loss_mask > 0], batch.rollout_log_probs[batch.loss_mask > 0], atol=1e-6
    )
    assert result.entropy is None


def test_temperature_reaches_the_log_probs(spec, make_trainer, make_batch) -> None:
    batch = make_batch(spec)
    hot = make_trainer(spec, TrainerSettings(algorithm=AlgorithmSettings(temperature=2.0))).log_probs(batch)
    plain = make_trainer(spec).log_probs(batch)
    assert np.nanmax(np.abs(hot.log_probs - plain.log_probs)) > 0.1
