"""The arithmetic of a rollout: how many samples, how many optimizer steps, how many rollouts."""

from __future__ import annotations

from dataclasses import dataclass

from miles.config import RunConfig


@dataclass(frozen=True)
class BatchPlan:
    """`rollout_batch_size × n_samples_per_prompt = global_batch_size × steps_per_rollout`."""

    rollout_batch_size: int
    n_samples_per_prompt: int
    global_batch_size: int
    steps_per_rollout: int

    @property
    def samples_per_rollout(self) -> int:
        return self.rollout_batch_size * self.n_samples_per_prompt


def plan_batches(config: RunConfig) -> BatchPlan | None:
    """The batch arithmetic of a run file, or None where rule BAT1 has something to say."""
    rollout, training = config.rollout, config.training
    if rollout.rollout_batch_size is None:
        return None
    samples = rollout.rollout_batch_size * rollout.n_samples_per_prompt
    steps = training.num_steps_per_rollout
    if steps is None:
        steps = samples // training.global_batch_size if training.global_batch_size else 1
    step = training.global_batch_size or samples // max(steps, 1)
    if steps < 1 or step * steps != samples:
        return None
    return BatchPlan(rollout.rollout_batch_size, rollout.n_samples_per_prompt, step, steps)


def plan_num_rollouts(config: RunConfig, num_prompts: int | None) -> int | None:
    """Rollouts of the run: `num_rollout`, or the whole rollouts in `num_epoch` passes over the prompts."""
    rollout = config.rollout
    if rollout.num_rollout is not None:
        return rollout.num_rollout
    if rollout.num_epoch is None or num_prompts is None or rollout.rollout_batch_size is None:
        return None
    return rollout.num_epoch * num_prompts // rollout.rollout_batch_size
