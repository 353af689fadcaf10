"""`[weight_sync]`: how new weights reach the engines."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from miles.config.sections.base import Section


class WeightSyncSection(Section):
    """Transport and rhythm of weight updates."""

    update_weights_interval: PositiveInt = 1
    """Rollouts between two updates."""

    update_weight_transfer_mode: Literal["tensor", "broadcast", "disk"] | None = None
    """Transport between processes: to each server over HTTP (`tensor`), through one process group of the
    trainer and all servers (`broadcast`: gloo, NCCL), or a directory (`disk`); default: CUDA handles under
    `colocate`, else `tensor`."""

    update_weight_buffer_size: PositiveInt = 512 * 1024**2
    """Bytes per bucket."""

    update_weight_delta: bool = False
    """Send a server only the tensors that differ from those it was given last (`tensor`, `broadcast`), or
    write only those that ever differed from the checkpoint it began with (`disk`)."""

    update_weight_disk_dir: str | None = None
    """Directory that trainer and engines share (`disk`)."""

    pause_generation_mode: Literal["abort", "retract", "in_place"] = "retract"
    """What happens to running requests: ended, sent back to recompute their cache, or continued on the old
    cache."""
