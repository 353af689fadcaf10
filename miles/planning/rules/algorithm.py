"""Rules on the optimizer and the loss: settings that cannot work, or that have no effect."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from miles.config import RunConfig
from miles.planning.critic import critic_only_rollouts, trains_critic
from miles.planning.findings import Found, Severity
from miles.planning.rules.rule import rule
from miles.planning.subject import Subject

HIGH_LR_SMALL = 1e-3
"""Above this GRPO collapsed a 226,000-parameter policy (3e-3 slowly, 1e-2 in five steps); 4e-4 learned."""

HIGH_LR_LARGE = 1e-5
"""RL recipes of published models of a billion parameters and more stay between 5e-7 and 5e-6."""

LARGE_PARAMETERS = 1_000_000_000

FAULT = re.compile(r"(nan_grad|stale_engine|skip_sync|corrupt_routes|drop_routes)@[1-9]\d*")


@rule(
    "LRN1",
    Severity.WARNING,
    title="the learning rate is high for reinforcement learning",
    cause="a policy that moves too far in one step stops being sampled from what it learned: reward falls "
    "to 0 and does not come back",
    fix="start lower, and raise it while the reward still climbs",
)
def learning_rate_high(subject: Subject) -> Iterator[Found]:
    spec, config = subject.spec, subject.config
    if spec is None or config.algorithm.loss_type == "sft_loss":
        return
    parameters = spec.num_parameters()
    limit = HIGH_LR_LARGE if parameters >= LARGE_PARAMETERS else HIGH_LR_SMALL
    if config.optimizer.lr > limit:
        yield Found(f"lr {config.optimizer.lr:g} > {limit:g} for {parameters:,} parameters", "optimizer.lr")


@rule(
    "LRN2",
    Severity.WARNING,
    title="the warm-up lasts as long as the run",
    cause="the learning rate climbs until lr_warmup_iters; this run has no more optimizer steps than that",
    fix="lower --lr-warmup-iters",
)
def warmup_too_long(subject: Subject) -> Iterator[Found]:
    steps, warmup = subject.optimizer_steps, subject.config.optimizer.lr_warmup_iters
    if steps is not None and warmup >= steps > 0:
        yield Found(f"{warmup} warm-up steps, {steps} optimizer steps", "optimizer.lr_warmup_iters")


@rule(
    "LRN3",
    Severity.WARNING,
    title="nothing is trained",
    cause="with a learning rate of 0 the weights never change",
    fix="set --lr",
)
def learning_rate_zero(subject: Subject) -> Iterator[Found]:
    if subject.config.optimizer.lr == 0:
        yield Found("lr is 0", "optimizer.lr")


@rule(
    "ALN1",
    Severity.ERROR,
    title="routing replay without routing",
    cause="R3 replays the experts of MoE layers; this model has none",
    fix="leave --use-rollout-routing-replay out",
)
def replay_without_experts(subject: Subject) -> Iterator[Found]:
    wanted = subject.config.alignment.use_rollout_routing_replay
    if wanted and subject.spec is not None and not subject.spec.is_moe:
        yield Found(
            f"{subject.facts.checkpoint.name} is a dense model", "alignment.use_rollout_routing_replay"
        )


@rule(
    "ALN2",
    Severity.WARNING,
    title="routing replay is off for an MoE model",
    cause="small numeric differences send tokens to other experts in training than in rollout, and the "
    "policy gradient is taken of another model than the one that sampled",
    fix="leave --no-use-rollout-routing-replay out",
)
def replay_off(subject: Subject) -> Iterator[Found]:
    wanted = subject.config.alignment.use_rollout_routing_replay
    if wanted is False and subject.spec is not None and subject.spec.is_moe:
        yield Found("use_rollout_routing_replay = false", "alignment.use_rollout_routing_replay")


@dataclass(frozen=True)
class Dependent:
    """Settings that only do something while a condition holds."""

    settings: tuple[str, ...]
    holds: Callable[[RunConfig], bool]
    needs: str


DISCOUNTED = ("ppo", "reinforce_plus_plus")
"""Estimators that read the discount; a function of the user may, too."""


def _discounts(config: RunConfig) -> bool:
    algorithm = config.algorithm
    return algorithm.advantage_estimator in DISCOUNTED or bool(algorithm.custom_advantage_function_path)


DEPENDENTS = (
    Dependent(
        ("training.max_tokens_per_gpu",),
        lambda c: c.training.use_dynamic_batch_size,
        "--use-dynamic-batch-size",
    ),
    Dependent(
        ("optimizer.min_lr", "optimizer.lr_decay_iters"),
        lambda c: c.optimizer.lr_decay_style != "constant",
        "--lr-decay-style linear or cosine",
    ),
    Dependent(
        (
            "algorithm.lambd", "critic.critic_load", "critic.critic_lr", "critic.critic_lr_warmup_iters",
            "critic.num_critic_only_steps", "critic.value_clip",
        ),
        trains_critic,
        "--advantage-estimator ppo and a policy loss",
    ),
    Dependent(
        ("algorithm.gamma",),
        _discounts,
        f"--advantage-estimator {' or '.join(DISCOUNTED)}",
    ),
    Dependent(
        (
            "rollout.rollout_temperature", "rollout.rollout_top_p", "rollout.rollout_top_k",
            "rollout.rollout_stop", "rollout.custom_generate_function_path",
        ),
        lambda c: c.algorithm.loss_type != "sft_loss",
        "a policy loss: demonstrations are not sampled",
    ),
    Dependent(
        (
            "eval.eval_interval", "eval.eval_greedy", "eval.n_samples_per_eval_prompt",
            "eval.eval_temperature", "eval.eval_top_p", "eval.eval_top_k", "eval.eval_max_response_len",
            "eval.eval_input_key", "eval.eval_label_key", "eval.eval_tool_key",
        ),
        lambda c: bool(c.eval.eval_prompt_data),
        "--eval-prompt-data NAME FILE",
    ),
)  # fmt: skip


@rule(
    "SET1",
    Severity.WARNING,
    title="a setting has no effect",
    cause="it belongs to a feature that is off in this run",
    fix="switch the feature on, or leave the setting out",
)
def setting_without_effect(subject: Subject) -> Iterator[Found]:
    explicit = dict(subject.explicit_settings())
    for dependent in DEPENDENTS:
        if dependent.holds(subject.config):
            continue
        for setting in dependent.settings:
            if setting in explicit and explicit[setting] != subject.default(setting):
                yield Found(f"{setting} is set, but needs {dependent.needs}", setting)


@rule(
    "KLD1",
    Severity.WARNING,
    title="the KL term has no weight",
    cause="the reference policy is held and run at every step, and its KL term is multiplied by 0",
    fix="set --kl-loss-coef, or leave --use-kl-loss out",
)
def kl_without_weight(subject: Subject) -> Iterator[Found]:
    algorithm = subject.config.algorithm
    if algorithm.use_kl_loss and algorithm.kl_loss_coef == 0:
        yield Found("use_kl_loss with kl_loss_coef 0", "algorithm.kl_loss_coef")


@rule(
    "CRT1",
    Severity.WARNING,
    title="the policy is never trained",
    cause="the critic learns alone from the first num_critic_only_steps rollouts; this run has no more",
    fix="lower --num-critic-only-steps; a critic alone may be what you want: another run takes it with "
    "--critic-load",
)
def critic_only(subject: Subject) -> Iterator[Found]:
    rollouts, alone = subject.num_rollouts, critic_only_rollouts(subject.config)
    if rollouts is not None and alone >= rollouts > 0:
        yield Found(f"{alone} rollouts of the critic alone, of {rollouts}", "critic.num_critic_only_steps")


@rule(
    "DBG1",
    Severity.ERROR,
    title="the fault to inject is not known",
    cause="inject_fault breaks a run on purpose, in a way and at a step that it names",
    fix="write --inject-fault nan_grad@10 (or stale_engine, skip_sync, corrupt_routes, drop_routes)",
)
def fault_unknown(subject: Subject) -> Iterator[Found]:
    fault = subject.config.debug.inject_fault
    if fault is None:
        return
    if (match := FAULT.fullmatch(fault)) is None:
        yield Found(f"{fault!r} is not a fault at a step", "debug.inject_fault")
    elif match[1] != "nan_grad" and subject.executor != "inline":
        yield Found(f"{match[1]} is injected by the inline executor only", "debug.inject_fault")
