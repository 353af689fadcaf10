"""Rules on batch arithmetic: the four knobs, groups and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator

from miles.planning.findings import Found, Severity
from miles.planning.rules.rule import rule
from miles.planning.subject import Subject

GROUP_NORMALISED = ("grpo", "gspo", "cispo", "rloo", "reinforce_plus_plus_baseline")
"""Estimators whose advantage is a reward minus the mean of its group."""


@rule(
    "BAT1",
    Severity.ERROR,
    title="the batch size is not set",
    cause="without prompts per rollout there is nothing to sample",
    fix="set --rollout-batch-size, or start from a profile: --profile quickstart",
)
def batch_size_unset(subject: Subject) -> Iterator[Found]:
    if subject.config.rollout.rollout_batch_size is None:
        yield Found("rollout_batch_size is not set", "rollout.rollout_batch_size")


@rule(
    "BAT2",
    Severity.WARNING,
    title="a prompt group straddles two optimizer steps",
    cause="the samples of one prompt are normalised together but would be trained in different steps, "
    "so a step's advantages no longer sum to zero per prompt",
    fix="make --global-batch-size a multiple of --n-samples-per-prompt",
)
def group_straddles(subject: Subject) -> Iterator[Found]:
    batch = subject.batch
    group = subject.config.rollout.n_samples_per_prompt
    if batch is not None and batch.steps_per_rollout > 1 and batch.global_batch_size % group:
        groups = batch.global_batch_size / group
        yield Found(
            f"{batch.global_batch_size} samples per step hold {groups:.2f} groups of {group}",
            "training.global_batch_size",
        )


@rule(
    "GRP1",
    Severity.ERROR,
    title="one sample per prompt leaves no advantage",
    cause="the advantage is the reward minus the mean of its group; in a group of one it is always 0, "
    "so nothing is ever learned",
    fix="set --n-samples-per-prompt 8, or --disable-rewards-normalization",
)
def group_of_one(subject: Subject) -> Iterator[Found]:
    algorithm = subject.config.algorithm
    if (
        algorithm.loss_type != "sft_loss"
        and algorithm.advantage_estimator in GROUP_NORMALISED
        and not algorithm.disable_rewards_normalization
        and subject.config.rollout.n_samples_per_prompt == 1
    ):
        yield Found(
            f"{algorithm.advantage_estimator} with 1 sample per prompt", "rollout.n_samples_per_prompt"
        )


@rule(
    "GRP2",
    Severity.WARNING,
    title="groups are very small",
    cause="mean and standard deviation of a group of two or three are mostly noise, and most groups with a "
    "binary reward carry no gradient at all",
    fix="set --n-samples-per-prompt 8 or more",
)
def small_group(subject: Subject) -> Iterator[Found]:
    group = subject.config.rollout.n_samples_per_prompt
    normalised = subject.config.algorithm.advantage_estimator in GROUP_NORMALISED
    if normalised and subject.config.algorithm.loss_type != "sft_loss" and 2 <= group <= 3:
        yield Found(f"{group} samples per prompt", "rollout.n_samples_per_prompt")


@rule(
    "RUN1",
    Severity.ERROR,
    title="the length of the run is not set",
    cause="neither the number of rollouts nor of epochs is given",
    fix="set --num-rollout, or --num-epoch",
)
def run_length_unset(subject: Subject) -> Iterator[Found]:
    rollout = subject.config.rollout
    if rollout.num_rollout is None and rollout.num_epoch is None:
        yield Found("num_rollout and num_epoch are both unset", "rollout.num_rollout")


@rule(
    "RUN2",
    Severity.ERROR,
    title="epochs cannot be counted",
    cause="num_rollout follows from num_epoch only when the number of prompts is known and gives a whole "
    "rollout",
    fix="set --num-rollout",
)
def epochs_uncountable(subject: Subject) -> Iterator[Found]:
    rollout, prompts = subject.config.rollout, subject.facts.prompts
    if rollout.num_rollout is not None or rollout.num_epoch is None or prompts is None or not prompts.exists:
        return
    if prompts.num_rows is None:
        yield Found(f"the prompts of {prompts.path} cannot be counted", "rollout.num_epoch")
    elif rollout.rollout_batch_size and rollout.num_epoch * prompts.num_rows < rollout.rollout_batch_size:
        yield Found(
            f"{rollout.num_epoch} epoch(s) of {prompts.num_rows} prompts are less than one rollout of "
            f"{rollout.rollout_batch_size}",
            "rollout.num_epoch",
        )
