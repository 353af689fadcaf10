"""`[critic]`: the value model of PPO."""

from __future__ import annotations

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat

from miles.config.sections.base import Section


class CriticSection(Section):
    """Weights and optimisation of the value model."""

    critic_load: str | None = None
    """Checkpoint of the critic, or of a language model of the policy's form; default: the policy itself."""

    critic_save: str | None = None
    """Directory of the critic's checkpoints; default: beside the policy's."""

    critic_lr: NonNegativeFloat | None = None
    """Peak learning rate of the critic; default: `lr`."""

    critic_lr_warmup_iters: NonNegativeInt = 0
    """Optimizer steps in which the critic's learning rate climbs to its peak."""

    num_critic_only_steps: NonNegativeInt = 0
    """First rollouts from which the critic learns alone; the policy stays as it is."""

    value_clip: PositiveFloat = 0.2
    """How far a value may move towards its return in the updates of one rollout."""
