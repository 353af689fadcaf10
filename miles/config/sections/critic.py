"""`[critic]`: the value model of PPO."""

from __future__ import annotations

from pydantic import NonNegativeFloat, NonNegativeInt

from miles.config.sections.base import Section


class CriticSection(Section):
    """Weights and optimisation of the value model."""

    critic_load: str | None = None
    """Checkpoint of the critic; default: the policy's, with a new value head."""

    critic_save: str | None = None
    """Directory of the critic's checkpoints; default: beside the policy's."""

    critic_lr: NonNegativeFloat | None = None
    """Peak learning rate of the critic; default: `lr`."""

    critic_lr_warmup_iters: NonNegativeInt = 0
    """Optimizer steps of the critic's warm-up."""

    num_critic_only_steps: NonNegativeInt = 0
    """First rollouts that train the critic alone."""

    value_clip: NonNegativeFloat = 0.2
    """Range in which a value may move per update."""
