"""On-policy distillation: what the teacher's advice is, and that the student follows it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from miles.arch import MoeSpec
from miles.data.batch import TrainBatch
from miles.errors import RunError
from miles.models.decoder import Decoder
from miles.training.batch_advantages import with_advantages
from miles.training.settings import AlgorithmSettings, OptimizerSettings, TrainerSettings
from miles.weights.native_map import to_published

SETTINGS = TrainerSettings(
    optimizer=OptimizerSettings(lr=1e-3), probe_tokens=0, algorithm=AlgorithmSettings(opd_kl_coef=0.5)
)


def teacher_of(spec, seed: int = 9) -> dict[str, torch.Tensor]:
    model = Decoder(spec)
    model.init_weights(torch.Generator().manual_seed(seed))
    return dict(to_published(model))


def with_teacher(trainer, spec, seed: int = 9):
    trainer.load_teacher(spec, teacher_of(spec, seed).items())
    return trainer


def test_advice_is_the_log_ratio_of_every_token(spec, make_batch) -> None:
    batch = make_batch(spec)
    rng = np.random.default_rng(0)
    student, teacher = (-rng.random(batch.num_tokens).astype(np.float32) for _ in range(2))
    student[batch.loss_mask == 0] = np.nan
    plain = AlgorithmSettings()
    expected, _ = with_advantages(batch, plain)
    batch = batch.with_rows(old_log_probs=student, teacher_log_probs=teacher)
    taught, metrics = with_advantages(batch, replace(plain, opd_kl_coef=0.5))
    trained = batch.loss_mask > 0
    assert expected.advantages is not None and taught.advantages is not None
    np.testing.assert_allclose(
        taught.advantages[trained],
        expected.advantages[trained] - 0.5 * (student - teacher)[trained],
        atol=1e-6,
    )
    assert (taught.advantages[~trained] == 0).all()
    assert metrics["rollout/opd_reverse_kl"] == pytest.approx((student - teacher)[trained].mean(), rel=1e-5)


def test_a_teacher_equal_to_the_student_has_no_advice(dense_spec, make_trainer, make_batch) -> None:
    trainer = with_teacher(make_trainer(dense_spec, SETTINGS), dense_spec, seed=0)
    metrics = trainer.train_step(make_batch(dense_spec)).metrics
    assert metrics["rollout/opd_reverse_kl"] == pytest.approx(0, abs=1e-6)


def test_the_teacher_may_be_another_model_and_reads_without_the_students_routes(
    spec, dense_spec, make_trainer, make_batch
) -> None:
    assert any(isinstance(layer.mlp, MoeSpec) for layer in spec.layers) and not dense_spec.is_moe
    batch = make_batch(spec, noise=0.3)
    trainer = with_teacher(make_trainer(spec, replace(SETTINGS, micro_batch_size=2)), dense_spec)
    alone = make_trainer(dense_spec, TrainerSettings(), seed=9).log_probs(replace(batch, routes=None))
    np.testing.assert_allclose(trainer.teacher.log_probs(batch), alone.log_probs, atol=1e-5)
    assert "rollout/opd_reverse_kl" in trainer.train_step(batch).metrics


def test_the_student_moves_towards_the_teacher(dense_spec, make_trainer, make_batch) -> None:
    """With rewards of 0 the gradient is that of the reverse KL on the sampled tokens."""
    settings = replace(SETTINGS, algorithm=AlgorithmSettings(opd_kl_coef=1.0))
    trainer = with_teacher(make_trainer(dense_spec, settings), dense_spec)
    batch: TrainBatch = make_batch(dense_spec, num_groups=8)
    batch = replace(batch, rewards=np.zeros_like(batch.rewards))
    teacher, trained = trainer.teacher.log_probs(batch), batch.loss_mask > 0
    before = trainer.log_probs(batch).log_probs
    trainer.train_step(batch)
    moved = trainer.log_probs(batch).log_probs - before
    wanted = (teacher - before)[trained]
    assert np.corrcoef(moved[trained], wanted)[0, 1] > 0.5


def test_a_teacher_that_was_not_loaded_is_named(dense_spec, make_trainer, make_batch) -> None:
    with pytest.raises(RunError, match="no teacher"):
        make_trainer(dense_spec, SETTINGS).train_step(make_batch(dense_spec))
