"""The settings that a running run changes at a step boundary, when it is asked to."""

from __future__ import annotations

SAMPLING_SETTINGS = frozenset({"sglang.speculative_num_steps"})
"""Dotted config keys of the engine side's live knobs."""

TRAINING_SETTINGS = frozenset(
    {
        "optimizer.lr",
        "critic.critic_lr",
        "algorithm.kl_loss_coef",
        "algorithm.entropy_coef",
        "correction.tis_clip",
        "correction.tis_clip_low",
        "correction.tis_threshold",
    }
)
"""Dotted config keys of the trainer's live knobs."""

LIVE_SETTINGS = TRAINING_SETTINGS | SAMPLING_SETTINGS
