"""The learning rate of an update: linear warm-up, then constant, linear or cosine decay to a floor.

The shapes are Megatron's (`optimizer_param_scheduler.py`), except that the first update of a warm-up of n
already gets 1/n of the peak instead of 0.
"""

from __future__ import annotations

import math

from miles.training.settings import ScheduleSettings


def learning_rate(update: int, peak: float, settings: ScheduleSettings) -> float:
    """The rate of update number `update`, counted from 0 over applied updates."""
    warmup = settings.lr_warmup_iters
    if update < warmup:
        return peak * (update + 1) / warmup
    if settings.lr_decay_style == "constant":
        return peak
    assert settings.lr_decay_iters is not None, "a decaying schedule needs lr_decay_iters"
    if update >= settings.lr_decay_iters:
        return settings.min_lr
    progress = (update - warmup) / max(1, settings.lr_decay_iters - warmup)
    if settings.lr_decay_style == "linear":
        remaining = 1.0 - progress
    else:
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.min_lr + (peak - settings.min_lr) * remaining
