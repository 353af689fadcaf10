"""Rules on rollouts whose engines never pause: the age of samples, and what does not go with it."""

from __future__ import annotations

from collections.abc import Iterator

from miles.planning.findings import Found, Severity
from miles.planning.rules.rule import rule
from miles.planning.subject import Subject

BOUND = "rollout.max_weight_staleness"
CONCURRENT = "rollout.async_max_concurrent_samples"


@rule(
    "OFF4",
    Severity.ERROR,
    title="a bound on staleness that no sample can meet",
    cause="between two weight updates the engines sample with weights of up to update_weights_interval - 1 "
    "steps ago: with a lower bound nothing may begin, and the run would wait for ever",
    fix="raise --max-weight-staleness to --update-weights-interval - 1 at least",
)
def bound_below_interval(subject: Subject) -> Iterator[Found]:
    bound = subject.config.rollout.max_weight_staleness
    interval = subject.config.weight_sync.update_weights_interval
    if subject.config.rollout.fully_async and bound is not None and bound < interval - 1:
        yield Found(f"max_weight_staleness {bound} with update_weights_interval {interval}", BOUND)


@rule(
    "OFF5",
    Severity.ERROR,
    title="a setting that does not go with engines that never pause",
    cause="requests go on while weights change, a bounded number of groups is in flight or finished, and "
    "there has to be somebody who samples",
    fix="leave --fully-async out",
)
def against_the_flow(subject: Subject) -> Iterator[Found]:
    config = subject.config
    rollout = config.rollout
    if not rollout.fully_async:
        return
    if config.algorithm.loss_type == "sft_loss":
        yield Found("fully_async with loss_type sft_loss", "rollout.fully_async")
    if config.weight_sync.pause_generation_mode == "abort":
        setting = "weight_sync.pause_generation_mode"
        yield Found("pause_generation_mode abort", setting, "use --pause-generation-mode retract or in_place")
    samples, batch = rollout.async_max_concurrent_samples, rollout.rollout_batch_size
    if samples is not None and batch is not None:
        held = int(rollout.async_data_buffer_capacity_factor * batch) * rollout.n_samples_per_prompt
        if samples > held:
            yield Found(
                f"{samples} samples in flight where {held} are held at most",
                CONCURRENT,
                "lower --async-max-concurrent-samples or raise --async-data-buffer-capacity-factor",
            )
