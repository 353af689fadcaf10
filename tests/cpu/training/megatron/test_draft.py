"""MTP layers in Megatron's form learn what the native trainer's learn, and the policy does not notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from miles.arch import ArchSpec, with_mtp
from miles.data.batch import TrainBatch
from miles.training.megatron.trainer import MegatronTrainer
from miles.training.native.trainer import NativeTrainer
from miles.training.settings import OptimizerSettings, TrainerSettings

SETTINGS = TrainerSettings(
    optimizer=OptimizerSettings(lr=1e-2, weight_decay=0.1), max_tokens_per_micro_batch=40, train_mtp=True
)
Batches = Callable[..., TrainBatch]
Trainer = MegatronTrainer | NativeTrainer


def trainer_of(kind: type[Trainer], spec: ArchSpec, settings: TrainerSettings, seed: int = 0) -> Trainer:
    trainer = kind(spec, settings)
    trainer.init_weights(seed)
    return trainer


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.named_weights()}


@pytest.mark.parametrize(
    ("layers", "steps"),
    [(1, 1), pytest.param(1, 3, marks=pytest.mark.slow), pytest.param(2, 2, marks=pytest.mark.slow)],
    ids=["one layer", "its own guesses", "two layers"],
)
def test_metrics_and_weights_equal_the_native_trainers(
    layers: int, steps: int, spec: ArchSpec, make_batch: Batches
) -> None:
    settings = replace(SETTINGS, mtp_training_steps=steps)
    ours, theirs = (
        trainer_of(kind, with_mtp(spec, layers), settings) for kind in (MegatronTrainer, NativeTrainer)
    )
    names = {"train/mtp_loss", "train/mtp_grad_norm"} | {
        f"train/mtp_accuracy/depth_{depth + 1}" for depth in range(steps)
    }
    for seed in range(2):
        batch = make_batch(spec, seed=seed, one_prompt_per_group=True)
        one, other = (trainer.train_step(batch).metrics for trainer in (ours, theirs))
        assert {name for name in one if "mtp" in name} == names
        for name in (*names, "train/loss", "train/grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    expected = weights_of(theirs)
    assert weights_of(ours).keys() == expected.keys()
    for name, tensor in ours.named_weights():
        assert (tensor - expected[name]).abs().mean() <= 1e-5, name


def test_the_policy_is_bit_identical_with_and_without_mtp_training(
    spec: ArchSpec, make_batch: Batches
) -> None:
    """The draft's gradient neither reaches the policy nor enters its norm."""
    plain = replace(SETTINGS, train_mtp=False, optimizer=replace(SETTINGS.optimizer, clip_grad=1e-2))
    alone = trainer_of(MegatronTrainer, spec, plain)
    mtp = replace(plain, train_mtp=True, mtp_loss_scaling_factor=50.0)
    along = trainer_of(MegatronTrainer, with_mtp(spec, 1), mtp)
    before = weights_of(along)
    for seed in range(2):
        batch = make_batch(spec, seed=seed)
        first, second = (trainer.train_step(batch).metrics for trainer in (alone, along))
        assert first["train/grad_norm"] == second["train/grad_norm"]
    after = weights_of(along)
    for name, tensor in weights_of(alone).items():
        assert torch.equal(tensor, after[name]), name
        assert not torch.equal(tensor, before[name]), name
    drafts = [name for name in after if name.startswith("mtp.")]
    assert drafts and all(not torch.equal(before[name], after[name]) for name in drafts)


def test_untrained_mtp_layers_pass_through_unchanged(mtp_spec: ArchSpec, make_batch: Batches) -> None:
    trainer = trainer_of(MegatronTrainer, mtp_spec, replace(SETTINGS, train_mtp=False))
    before = weights_of(trainer)
    metrics = trainer.train_step(make_batch(mtp_spec)).metrics
    after = weights_of(trainer)
    assert not any("mtp" in name for name in metrics)
    assert all(torch.equal(before[n], after[n]) for n in after if n.startswith("mtp."))
    assert "mtp.fc.weight" in after


def test_a_broken_draft_is_reported_and_does_not_stop_the_policy(
    mtp_spec: ArchSpec, make_batch: Batches
) -> None:
    trainer = trainer_of(MegatronTrainer, mtp_spec, SETTINGS)
    assert isinstance(trainer, MegatronTrainer)
    trainer.tensors.set_first_element("mtp.fc.weight", torch.inf, lambda parameter: parameter.data)
    result = trainer.train_step(make_batch(mtp_spec))
    (event,) = result.events
    assert (event["kind"], event["what"], event["tensor"]) == ("non_finite", "weight", "mtp.fc.weight")
    assert result.metrics["train/mtp_non_finite_elements"] == 1
    assert result.metrics["train/step_skipped"] == 0
    assert (trainer.state.updates, trainer.state.draft_updates) == (1, 0)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_run_goes_on_bit_for_bit_and_on_the_other_trainer(
    dtype: torch.dtype, mtp_spec: ArchSpec, make_batch: Batches, tmp_path: Path
) -> None:
    first, second = make_batch(mtp_spec, seed=0), make_batch(mtp_spec, seed=1)
    whole = MegatronTrainer(mtp_spec, SETTINGS, dtype=dtype)
    whole.init_weights(0)
    whole.train_step(first)
    whole.save(tmp_path)
    whole.train_step(second)
    expected = weights_of(whole)

    again = MegatronTrainer(mtp_spec, SETTINGS, dtype=dtype)
    again.load(tmp_path)
    assert again.state.draft_updates == 1
    again.train_step(second)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.named_weights())

    other = NativeTrainer(mtp_spec, SETTINGS, dtype=dtype)
    other.load(tmp_path)
    other.train_step(second)
    for name, tensor in other.named_weights():
        bound = 1e-5 if dtype == torch.float32 else 2e-3
        assert (tensor - expected[name]).abs().float().mean() <= bound, name


@pytest.mark.slow
def test_a_run_in_bf16_goes_on_bit_for_bit_from_torch_dist(
    mtp_spec: ArchSpec, make_batch: Batches, tmp_path: Path
) -> None:
    """The fp32 masters come back, those of the MTP layer too."""
    first, second = make_batch(mtp_spec, seed=0), make_batch(mtp_spec, seed=1)
    whole, again = (
        MegatronTrainer(mtp_spec, SETTINGS, dtype=torch.bfloat16, dist_checkpoints=True) for _ in range(2)
    )
    whole.init_weights(0)
    whole.train_step(first)
    whole.save(tmp_path)
    whole.train_step(second)
    again.load(tmp_path)
    again.train_step(second)
    expected = weights_of(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.named_weights())


def test_training_the_draft_may_begin_and_end_with_a_resume(
    mtp_spec: ArchSpec, make_batch: Batches, tmp_path: Path
) -> None:
    frozen = trainer_of(MegatronTrainer, mtp_spec, replace(SETTINGS, train_mtp=False))
    frozen.train_step(make_batch(mtp_spec))
    (tmp_path / "frozen").mkdir()
    frozen.save(tmp_path / "frozen")
    training = trainer_of(MegatronTrainer, mtp_spec, SETTINGS, seed=3)
    training.load(tmp_path / "frozen")
    assert training.state.draft_updates == 0
    training.train_step(make_batch(mtp_spec, seed=1))
    (tmp_path / "trained").mkdir()
    training.save(tmp_path / "trained")
    expected = weights_of(training)
    for spec in (mtp_spec, mtp_spec.policy):
        resumed = trainer_of(MegatronTrainer, spec, replace(SETTINGS, train_mtp=False), seed=5)
        resumed.load(tmp_path / "trained")
        assert resumed.state.draft_updates is None
        assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.named_weights())
