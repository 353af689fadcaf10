"""The MTP layers learn from every rollout, and the policy does not notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from miles.arch import ArchSpec, with_mtp
from miles.data.batch import TrainBatch
from miles.models.attention import PackedAttention
from miles.models.logprob import token_log_probs
from miles.models.routing import Router
from miles.training.draft_course import lessons
from miles.training.native.trainer import NativeTrainer
from miles.training.settings import OptimizerSettings, TrainerSettings
from miles.weights.hf import read_hf

PLAIN = TrainerSettings(optimizer=OptimizerSettings(lr=1e-3, weight_decay=0.1), train_mtp=True)


def trainer_of(spec: ArchSpec, settings: TrainerSettings = PLAIN, seed: int = 0) -> NativeTrainer:
    trainer = NativeTrainer(spec, settings)
    trainer.init_weights(seed)
    return trainer


def weights_of(trainer: NativeTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.named_weights()}


@pytest.fixture
def batches(make_batch: Callable, spec: ArchSpec) -> list[TrainBatch]:
    return [make_batch(spec, seed=seed) for seed in range(4)]


def test_a_depth_is_taught_where_every_token_it_reads_and_says_is_trained_on(batches) -> None:
    """Mask shifted once times mask shifted twice (and thrice for the second layer), within a sequence."""
    batch = batches[0]
    taught = list(lessons(batch, np.arange(batch.num_tokens), batch.cu_seqlens, 2))
    for depth, lesson in enumerate(taught):
        expected, targets = [], []
        for start, stop in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            for row in range(start, stop - depth - 1):
                if all(batch.loss_mask[row : row + depth + 2] > 0):
                    expected.append(row)
                    targets.append(batch.targets[row + depth + 1])
                    assert lesson.tokens[row] == batch.targets[row + depth]
        assert lesson.rows.tolist() == expected and lesson.targets.tolist() == targets
    assert 0 < len(taught[1].rows) < len(taught[0].rows)


@pytest.mark.parametrize(
    "settings", [PLAIN, replace(PLAIN, max_tokens_per_micro_batch=30)], ids=["one", "cut"]
)
def test_the_loss_is_the_mean_cross_entropy_two_tokens_ahead(settings, mtp_spec, batches) -> None:
    """Computed here sequence by sequence; micro-batches and shared prompts change nothing."""
    trainer, batch = trainer_of(mtp_spec, settings), batches[0]
    losses, correct = [], []
    for start, stop in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        tokens = torch.from_numpy(batch.tokens[start:stop])
        positions, attention = torch.arange(stop - start), PackedAttention(torch.tensor([0, stop - start]))
        routes = torch.from_numpy(batch.routes[start:stop])
        with torch.no_grad():
            hidden = trainer.decoder(tokens, positions, attention, Router.replay(routes))
            following = torch.from_numpy(batch.targets[start:stop])
            features = trainer.draft(hidden, following, positions, attention, trainer.decoder)
        log_probs, _ = token_log_probs(features[:-1], trainer.decoder.head_weight, following[1:])
        mask = torch.from_numpy(batch.loss_mask[start:stop] > 0)
        taught = mask[:-1] & mask[1:]
        losses.append(-log_probs[taught])
        best = trainer.draft.logits(features, trainer.decoder).argmax(-1)[:-1]
        correct.append((best == following[1:])[taught])
    metrics = trainer.train_step(batch).metrics
    assert metrics["train/mtp_loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)
    assert metrics["train/mtp_accuracy/depth_1"] == pytest.approx(torch.cat(correct).float().mean().item())


@pytest.mark.parametrize("clip_grad", [1.0, 1e-3], ids=["loose", "tight"])
def test_the_policy_is_bit_identical_with_and_without_mtp_training(clip_grad, spec, batches) -> None:
    """20 steps; the draft's gradient neither reaches the policy nor enters its norm."""
    plain = replace(PLAIN, train_mtp=False, optimizer=replace(PLAIN.optimizer, clip_grad=clip_grad))
    alone = trainer_of(spec, plain)
    mtp = replace(plain, train_mtp=True, mtp_training_steps=3, mtp_loss_scaling_factor=50.0)
    along = trainer_of(with_mtp(spec, 2), mtp)
    before = weights_of(along)
    for step in range(20):
        first = alone.train_step(batches[step % 4]).metrics
        second = along.train_step(batches[step % 4]).metrics
        assert first["train/grad_norm"] == second["train/grad_norm"]
    after = weights_of(along)
    for name, tensor in weights_of(alone).items():
        assert torch.equal(tensor, after[name]), name
        assert not torch.equal(tensor, before[name]), name
    drafts = [name for name in after if name.startswith("mtp.")]
    assert drafts and all(not torch.equal(before[name], after[name]) for name in drafts)


def test_the_draft_learns_the_policy(mtp_spec, batches) -> None:
    settings = replace(PLAIN, optimizer=OptimizerSettings(lr=3e-3))
    trainer = trainer_of(mtp_spec, settings)
    losses = [trainer.train_step(batches[0]).metrics["train/mtp_loss"] for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]


def test_one_layer_learns_to_go_on_from_its_own_guesses(mtp_spec, batches) -> None:
    """Three tokens ahead with one layer: the third is learned only where it is taught."""
    settings = replace(PLAIN, optimizer=OptimizerSettings(lr=3e-3))
    taught = trainer_of(mtp_spec, replace(settings, mtp_training_steps=3))
    accuracies = [taught.train_step(batches[0]).metrics for _ in range(30)]
    for depth in (1, 2, 3):
        name = f"train/mtp_accuracy/depth_{depth}"
        assert accuracies[-1][name] > accuracies[0][name]
    untaught = trainer_of(mtp_spec, settings)
    assert "train/mtp_accuracy/depth_2" not in untaught.train_step(batches[0]).metrics


def test_untrained_mtp_layers_pass_through_unchanged(mtp_spec, batches) -> None:
    trainer = trainer_of(mtp_spec, replace(PLAIN, train_mtp=False))
    before = weights_of(trainer)
    metrics = trainer.train_step(batches[0]).metrics
    after = weights_of(trainer)
    assert not any(name.startswith("train/mtp") for name in metrics)
    assert all(torch.equal(before[n], after[n]) for n in after if n.startswith("mtp."))
    assert "mtp.fc.weight" in after


def test_a_step_without_two_trained_tokens_in_a_row_leaves_the_draft_alone(mtp_spec, batches) -> None:
    """Absent, not zero."""
    trainer, batch = trainer_of(mtp_spec), batches[0]
    mask = batch.loss_mask.copy()
    mask[1::2] = 0
    before = weights_of(trainer)
    metrics = trainer.train_step(replace(batch, loss_mask=mask)).metrics
    after = weights_of(trainer)
    assert not any(name.startswith("train/mtp") for name in metrics)
    assert all(torch.equal(before[n], after[n]) for n in after if n.startswith("mtp."))


def test_a_broken_draft_is_reported_and_does_not_stop_the_policy(spec, mtp_spec, batches) -> None:
    """One infinite element in the draft: named, counted, not repaired; the policy moves on unharmed."""
    alone, along = trainer_of(spec, replace(PLAIN, train_mtp=False)), trainer_of(mtp_spec)
    with torch.no_grad():
        along.draft.projections[0].fc[0, 0] = torch.inf
    alone.train_step(batches[0])
    result = along.train_step(batches[0])
    (event,) = result.events
    assert (event["kind"], event["what"], event["tensor"]) == ("non_finite", "weight", "mtp.fc.weight")
    assert result.metrics["train/mtp_non_finite_elements"] == 1
    assert result.metrics["train/step_skipped"] == 0
    assert not result.stop
    after = weights_of(along)
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights_of(alone).items())
    assert (along.state.updates, along.state.draft_updates) == (1, 0)
    stopping = trainer_of(mtp_spec, replace(PLAIN, non_finite_policy="stop"))
    with torch.no_grad():
        stopping.draft.projections[0].fc[0, 0] = torch.inf
    assert stopping.train_step(batches[0]).stop


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_draft_goes_on_bit_for_bit(dtype, mtp_spec, batches, tmp_path: Path) -> None:
    one = NativeTrainer(mtp_spec, PLAIN, dtype=dtype)
    one.init_weights(0)
    one.train_step(batches[0])
    one.save(tmp_path)
    names = dict(read_hf(tmp_path / "model"))
    assert "mtp.layers.0.mlp.experts.5.up_proj.weight" in names
    other = NativeTrainer(mtp_spec, PLAIN, dtype=dtype)
    other.init_weights(9)
    other.load(tmp_path)
    assert other.state == one.state and other.state.draft_updates == 1
    for batch in batches[1:3]:
        assert one.train_step(batch).metrics.items() >= _mtp(other.train_step(batch).metrics).items()
    ours, theirs = weights_of(one), weights_of(other)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def _mtp(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith("train/mtp")}


def test_training_the_draft_may_begin_and_end_with_a_resume(mtp_spec, batches, tmp_path: Path) -> None:
    frozen = trainer_of(mtp_spec, replace(PLAIN, train_mtp=False))
    frozen.train_step(batches[0])
    (tmp_path / "frozen").mkdir()
    frozen.save(tmp_path / "frozen")
    training = trainer_of(mtp_spec, seed=3)
    training.load(tmp_path / "frozen")
    assert training.state.draft_updates == 0
    training.train_step(batches[1])
    assert training.state.draft_updates == 1
    (tmp_path / "trained").mkdir()
    training.save(tmp_path / "trained")
    frozen.load(tmp_path / "trained")
    assert frozen.state.draft_updates is None
    expected = weights_of(training)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(frozen).items())
    without = trainer_of(mtp_spec.policy, replace(PLAIN, train_mtp=False), seed=5)
    without.load(tmp_path / "trained")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(without).items())
