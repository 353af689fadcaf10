"""The critic of PPO: what it learns, and how good its values are."""

from __future__ import annotations

from miles.record.metrics.metric import FRACTION, SECONDS, Band, Metric

CRITIC: tuple[Metric, ...] = (
    Metric(
        "train/value_loss",
        "mean squared distance of values to returns, clipped",
        "",
        None,
        "reward scale, critic.critic_lr",
    ),
    Metric(
        "train/value_clipfrac",
        "fraction of tokens whose value moved out of its clip range",
        FRACTION,
        Band(0, 0.3),
        "critic.critic_lr, critic.value_clip and optimizer steps per rollout",
    ),
    Metric(
        "train/explained_variance",
        "share of the variance of returns that the values explain; below 0 they are worse than a constant",
        FRACTION,
        Band(0, 1),
        "critic.critic_lr, critic.num_critic_only_steps; rewards that nothing can foresee keep it at 0",
    ),
    Metric(
        "train/critic_grad_norm",
        "norm of the critic's gradient before clipping, which is its own",
        "",
        None,
        "reward scale",
    ),
    Metric("train/critic_lr", "learning rate of the critic's step", "", None, "schedule, or a live change"),
    Metric(
        "train/critic_non_finite_elements",
        "elements that kept the critic from being updated; absent when there were none",
        "",
        Band(high=0.0),
        "non-finite values and training.non_finite_policy",
    ),
    Metric("rollout/values", "mean value of trained tokens before the update", "", None, "the critic"),
    Metric("rollout/returns", "mean return of trained tokens: advantage plus value", "", None, "rewards"),
    Metric("perf/values_time", "time of the critic's values", SECONDS, None, "tokens per step"),
)
