"""`[checkpoint]`: what is kept, and how often."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from miles.config.sections.base import Section


class CheckpointSection(Section):
    """Training checkpoints: weights, optimizer state, random streams, position in the data."""

    save: str | None = None
    """Directory of checkpoints; default: `checkpoints/` in the run directory."""

    save_interval: PositiveInt | None = None
    """Save every so many rollouts; default: only after the last."""

    keep_checkpoints: PositiveInt | None = None
    """Newest checkpoints that are kept; default: all."""

    no_save_optim: bool = False
    """Leave optimizer state out; such a checkpoint cannot be resumed."""

    ckpt_format: Literal["published", "torch_dist"] = "published"
    """Form of what is saved: under published names, for any layout and trainer, written by the first rank; or
    as Megatron's distributed checkpoint, for any of its layouts, written by every rank."""

    async_save: bool = False
    """Write while training goes on: the run waits until what is saved is copied or shared, and the checkpoint
    counts once it is whole."""

    custom_megatron_post_save_hook_path: str | None = None
    """Python path of a function called after each save of the Megatron trainer."""
