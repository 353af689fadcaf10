"""What the critic of a run starts from: a checkpoint of its own, or the policy."""

from __future__ import annotations

from pathlib import Path

from miles.arch import load_spec
from miles.orchestration.train_worker import AnyTrainer
from miles.weights.hf import read_hf


def start_critic(trainer: AnyTrainer, checkpoint: str | None) -> None:
    """Fill the critic of a trainer whose policy is loaded. `checkpoint`: `--critic-load`.

    Raises CheckpointError for one of another form than the policy's.
    """
    if checkpoint is None:
        trainer.start_critic()
        return
    trainer.load_critic(load_spec(checkpoint), read_hf(Path(checkpoint)))
