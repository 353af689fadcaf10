"""A checkpoint that is written while training goes on holds the moment it was asked for, bit for bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from miles.arch import ArchSpec
from miles.data.batch import TrainBatch
from miles.errors import CheckpointError
from miles.training.megatron.dist_checkpoint import DIST_DIR
from miles.training.megatron.layout import MegatronLayout
from miles.training.megatron.options import MegatronOptions
from miles.training.megatron.trainer import MegatronTrainer
from miles.training.settings import OptimizerSettings, TrainerSettings

pytestmark = pytest.mark.slow

SETTINGS = TrainerSettings(optimizer=OptimizerSettings(lr=1e-2), max_tokens_per_micro_batch=40)
INDEX = "metadata.json"
"""Megatron's word that a checkpoint is whole."""


def trainer_of(spec: ArchSpec) -> MegatronTrainer:
    trainer = MegatronTrainer(spec, SETTINGS, dist_checkpoints=True, background_saves=True)
    trainer.init_weights(0)
    return trainer


def writer(trainer: MegatronTrainer) -> int:
    """Process id."""
    (call,) = trainer._background._queue.async_calls
    pid: int = call.async_caller.process.pid
    return pid


def test_what_was_asked_for_is_saved_though_training_went_on(
    spec: ArchSpec, make_batch: Callable[..., TrainBatch], tmp_path: Path
) -> None:
    first, second = make_batch(spec, seed=0), make_batch(spec, seed=1)
    trainer = trainer_of(spec)
    trainer.train_step(first)
    trainer.save(tmp_path)
    saved = {name: tensor.clone() for name, tensor in trainer.named_weights()}
    os.kill(writer(trainer), signal.SIGSTOP)
    trainer.train_step(second)
    assert not trainer.finish_saving(wait=False) and not (tmp_path / DIST_DIR / INDEX).exists()
    os.kill(writer(trainer), signal.SIGCONT)
    assert trainer.finish_saving(wait=True) and (tmp_path / DIST_DIR / INDEX).exists()
    assert trainer.finish_saving(wait=False)

    again = trainer_of(spec)
    again.load(tmp_path)
    assert again.step == 1
    assert all(torch.equal(tensor, saved[name]) for name, tensor in again.named_weights())
    again.train_step(second)  # moments and masters too
    expected = dict(trainer.named_weights())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.named_weights())


def test_a_writer_that_was_killed_is_told(
    spec: ArchSpec, make_batch: Callable[..., TrainBatch], tmp_path: Path
) -> None:
    trainer = trainer_of(spec)
    trainer.train_step(make_batch(spec))
    trainer.save(tmp_path)
    os.kill(writer(trainer), signal.SIGKILL)
    with pytest.raises(CheckpointError, match="in the background"):
        trainer.finish_saving(wait=True)
    assert not (tmp_path / DIST_DIR / INDEX).exists()


def test_two_ranks_save_beside_what_they_save_while_waiting(
    world: Callable[..., Any], tmp_path: Path, spec: ArchSpec, make_batches: Any
) -> None:
    """Experts and optimizer states of both ranks, dealt out."""
    options = MegatronOptions(distributed_optimizer=True)
    layout, batches = MegatronLayout(ep=2, options=options), make_batches(spec, 2)
    how = {"spec": spec, "settings": SETTINGS, "layout": layout}
    cases: dict[str, Any] = {}
    for name, beside in (("beside", True), ("waiting", False)):
        (tmp_path / name).mkdir()
        saves = {"save": tmp_path / name, "dist_checkpoints": True, "background_saves": beside}
        cases[name] = ("train", how | saves | {"batches": batches[:1], "then": batches[1:]})
        cases[f"held {name}"] = ("go_on", how | {"load": tmp_path / name, "batches": []})
    results = world(2, tmp_path / "two", cases)[0]
    for beside, waiting in zip(results["held beside"][1:], results["held waiting"][1:], strict=True):
        assert all(torch.equal(tensor, waiting[name]) for name, tensor in beside.items())
    assert results["beside"][0] == results["waiting"][0]
