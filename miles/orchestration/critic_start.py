"""What the critic of a run starts from: a checkpoint of its own, or the policy."""

from __future__ import annotations

from pathlib import Path

from miles.arch import load_spec, published_tensors
from miles.errors import ConfigError, MilesError
from miles.orchestration.train_worker import AnyTrainer
from miles.training.native.trainer import NativeTrainer
from miles.weights.hf import read_hf


def start_critic(trainer: AnyTrainer, checkpoint: str | None) -> None:
    """Fill the critic of a trainer whose policy is loaded. `checkpoint`: `--critic-load`.

    Raises ConfigError for a checkpoint of another form than the policy's, CheckpointError for one that cannot
    be read.
    """
    assert isinstance(trainer, NativeTrainer), "preflight refuses a critic with other trainers"
    if checkpoint is None:
        trainer.start_critic()
        return
    saved = load_spec(checkpoint)
    if published_tensors(saved.critic) != published_tensors(trainer.spec.critic):
        raise ConfigError(
            MilesError(
                "the critic is another model than the policy",
                where=f"--critic-load {checkpoint}",
                why="a critic is built in the policy's form: the same layers, widths and vocabulary",
                fix="use a checkpoint of that form, or leave --critic-load out to start from the policy",
            )
        )
    trainer.load_critic(saved, read_hf(Path(checkpoint)))
