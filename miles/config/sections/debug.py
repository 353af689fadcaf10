"""`[debug]`: running half of the ring, replaying data, and breaking things on purpose."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from miles.config.sections.base import Section


class DebugSection(Section):
    """Switches for finding faults."""

    inject_fault: str | None = None
    """Break the run on purpose, to see what diagnosis says: `kind@step`, such as `nan_grad@10`. Kinds:
    nan_grad (one NaN in a gradient), and from that step on stale_engine (old weights that claim to be new),
    skip_sync (no more weight updates), corrupt_routes (those of the neighbouring token), drop_routes."""

    capsule_interval: Annotated[int | None, Field(ge=1)] = None
    """Keep every so many steps whole under `capsules/`: all samples with routes, and the weights that the
    step starts from. `miles replay` runs them again. Default: none. Each costs a copy of the weights."""

    debug_rollout_only: bool = False
    """Sample, but do not train."""

    debug_train_only: bool = False
    """Train on saved rollouts, without engines."""

    save_debug_rollout_data: str | None = None
    """Write each rollout to this file; `{rollout_id}` is replaced."""

    load_debug_rollout_data: str | None = None
    """Read rollouts from this file instead of sampling."""

    load_debug_rollout_data_subsample: Annotated[float | None, Field(gt=0.0, le=1.0)] = None
    """Share of each loaded rollout that is used; default: all."""

    save_debug_train_data: str | None = None
    """Write each training batch to this file; `{rollout_id}` is replaced."""

    check_weight_update_equal: bool = False
    """Compare the engine's weights with the trainer's after each update."""

    debug_skip_weight_update: bool = False
    """Leave the engine's weights as they are."""
