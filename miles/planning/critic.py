"""Whether a run trains a critic, and for how long it does so alone."""

from __future__ import annotations

from miles.config import RunConfig


def trains_critic(config: RunConfig) -> bool:
    """Whether advantages are taken against the values of a model of their own (PPO)."""
    algorithm = config.algorithm
    return algorithm.advantage_estimator == "ppo" and algorithm.loss_type != "sft_loss"


def critic_only_rollouts(config: RunConfig) -> int:
    """The first rollouts, from which the policy learns nothing."""
    return config.critic.num_critic_only_steps if trains_critic(config) else 0
