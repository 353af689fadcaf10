"""Live knobs change the next step; contradicting settings and impossible changes are refused in words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from miles.algorithms.importance import ImportanceCorrection
from miles.algorithms.losses import PolicyLossSettings
from miles.errors import DataError, MilesError, RunError
from miles.training.native.trainer import NativeTrainer
from miles.training.settings import AlgorithmSettings, ScheduleSettings, TrainerSettings


def test_lr_takes_effect_at_the_next_step(spec, make_trainer, make_batch) -> None:
    trainer = make_trainer(spec)
    trainer.set("lr", 0.0)
    before = {name: tensor.clone() for name, tensor in trainer.named_weights()}
    assert trainer.train_step(make_batch(spec)).metrics["train/lr"] == 0.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.named_weights())
    trainer.set("lr", 1e-3)
    assert trainer.train_step(make_batch(spec)).metrics["train/lr"] == 1e-3
    assert any((tensor != before[name]).any() for name, tensor in trainer.named_weights())


def test_importance_correction_can_be_switched_on_and_between_kinds(spec, make_trainer, make_batch) -> None:
    trainer = make_trainer(spec)
    batch = make_batch(spec, weights_seed=3)
    assert "train/tis" not in trainer.train_step(batch).metrics
    trainer.set("tis_clip", 1.01)
    assert trainer.train_step(batch).metrics["train/tis_clipfrac"] > 0
    assert trainer.knobs()["tis_clip_low"] == 0.0
    trainer.set("tis_threshold", 0.99)
    assert set(trainer.knobs()) == {"lr", "kl_loss_coef", "entropy_coef", "tis_threshold"}


def test_a_live_bound_keeps_the_level_and_the_kind_of_the_correction(spec, make_trainer) -> None:
    masked = ImportanceCorrection(0.5, 5.0, "mask", "geometric")
    policy = PolicyLossSettings(correction=masked)
    trainer = make_trainer(spec, TrainerSettings(algorithm=AlgorithmSettings(policy=policy)))

    def in_effect() -> ImportanceCorrection | None:
        return trainer.state.knobs.apply(policy).correction

    assert in_effect() == masked
    trainer.set("tis_clip", 4.0)
    assert in_effect() == replace(masked, high=4.0)
    trainer.set("tis_threshold", 0.8)
    assert in_effect() == masked.within(0.8)


def test_a_correction_that_is_only_measured_is_switched_on_by_a_bound(spec, make_trainer) -> None:
    policy = PolicyLossSettings(correction=ImportanceCorrection(applied=False))
    trainer = make_trainer(spec, TrainerSettings(algorithm=AlgorithmSettings(policy=policy)))
    assert trainer.state.knobs.apply(policy) == policy
    trainer.set("tis_clip", 4.0)
    assert trainer.state.knobs.apply(policy).correction == ImportanceCorrection(0.0, 4.0)


def test_entropy_bonus_changes_the_loss(spec, make_trainer, make_batch) -> None:
    trainer = make_trainer(spec)
    trainer.set("entropy_coef", 0.5)
    metrics = trainer.train_step(make_batch(spec)).metrics
    expected = metrics["train/pg_loss"] - 0.5 * metrics["train/entropy"]
    assert metrics["train/loss"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("knob", "value", "algorithm"),
    [
        ("temperature", 1.0, AlgorithmSettings()),
        ("lr", -1.0, AlgorithmSettings()),
        ("lr", float("nan"), AlgorithmSettings()),
        ("tis_threshold", 0.0, AlgorithmSettings()),
        ("kl_loss_coef", 0.1, AlgorithmSettings()),
        ("tis_clip", 2.0, AlgorithmSettings(use_rollout_logprobs=True)),
    ],
)
def test_impossible_changes_are_refused(knob, value, algorithm, spec, make_trainer) -> None:
    trainer = make_trainer(spec, TrainerSettings(algorithm=algorithm))
    with pytest.raises(RunError, match=knob):
        trainer.set(knob, value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (TrainerSettings(algorithm=AlgorithmSettings(kl_coef=0.1)), "no KL penalty"),
        (
            TrainerSettings(
                algorithm=AlgorithmSettings(
                    "policy_loss",
                    "reinforce_plus_plus",
                    kl_coef=0.1,
                    use_kl_loss=True,
                    policy=PolicyLossSettings(kl_loss_coef=0.1),
                )
            ),
            "count twice",
        ),
        (
            TrainerSettings(algorithm=AlgorithmSettings(policy=PolicyLossSettings(kl_loss_coef=0.1))),
            "use_kl_loss",
        ),
        (
            TrainerSettings(
                algorithm=AlgorithmSettings(
                    use_rollout_logprobs=True, policy=PolicyLossSettings(correction=ImportanceCorrection())
                )
            ),
            "no effect",
        ),
        (TrainerSettings(max_tokens_per_micro_batch=10, micro_batch_size=2), "choose one"),
        (TrainerSettings(algorithm=AlgorithmSettings(advantage_estimator="dr_grpo")), "max_response_len"),
        (TrainerSettings(schedule=ScheduleSettings(lr_decay_style="cosine")), "lr_decay_iters"),
        (TrainerSettings(algorithm=AlgorithmSettings(temperature=0.0)), "temperature"),
        (TrainerSettings(algorithm=AlgorithmSettings(advantage_estimator="a2c")), "grpo"),
        (TrainerSettings(algorithm=AlgorithmSettings(advantage_estimator="gspo")), "objective"),
    ],
)
def test_contradictions_are_refused_at_the_start(settings, words, spec) -> None:
    with pytest.raises(MilesError, match=words):
        NativeTrainer(spec, settings)


def test_a_reference_that_was_not_loaded_is_named(spec, make_trainer, make_batch) -> None:
    trainer = make_trainer(spec, TrainerSettings(algorithm=AlgorithmSettings(use_kl_loss=True)))
    with pytest.raises(RunError, match="reference"):
        trainer.train_step(make_batch(spec))


def test_a_correction_needs_the_engines_log_probs_of_every_trained_token(
    spec, make_trainer, make_batch
) -> None:
    trainer = make_trainer(spec)
    trainer.set("tis_clip", 2.0)
    batch = make_batch(spec)
    log_probs = batch.rollout_log_probs.copy()
    log_probs[batch.loss_mask > 0] = float("nan")
    with pytest.raises(DataError, match="sample 0"):
        trainer.train_step(batch.with_rows(rollout_log_probs=log_probs))
