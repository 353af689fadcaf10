"""What a trainer is told, as frozen plain values. Names follow the run file; units are stated where they
exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch import Tensor

from miles.algorithms.advantages import ESTIMATORS, Estimator
from miles.algorithms.losses import LossOutput, LossRows, PolicyLossSettings
from miles.algorithms.reductions import Reduction
from miles.arch.precision import PrecisionPolicy
from miles.data.batch import TrainBatch
from miles.errors import MilesError
from miles.models.recompute import RecomputedModule

LossType = Literal["policy_loss", "sft_loss", "custom_loss"]
CustomLoss = Callable[[LossRows], LossOutput]
"""A loss of the user's, over the rows of a micro-batch."""
CustomAdvantages = Callable[[TrainBatch], np.ndarray]
"""Advantages float32 [T] of a rollout batch, in place of the estimator's."""
CustomReducer = Callable[[TrainBatch, int], Tensor]
"""Weights float32 [T] of the policy-gradient loss over an optimizer step of so many rollouts."""
NonFinitePolicy = Literal["skip", "stop"]
DecayStyle = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW. `clip_grad` bounds the global gradient norm; 0 leaves it unbounded."""

    lr: float = 1e-6
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    adam_eps: float = 1e-8
    clip_grad: float = 1.0


@dataclass(frozen=True)
class ScheduleSettings:
    """Learning rate over optimizer updates; `lr_decay_iters` counts the warm-up in."""

    lr_decay_style: DecayStyle = "constant"
    lr_warmup_iters: int = 0
    lr_decay_iters: int | None = None
    min_lr: float = 0.0


@dataclass(frozen=True)
class CriticSettings:
    """The value model of PPO. From the first `num_critic_only_steps` rollouts it learns alone."""

    lr: float = 1e-6
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    value_clip: float = 0.2
    num_critic_only_steps: int = 0


@dataclass(frozen=True)
class AlgorithmSettings:
    """Loss, advantages and which log-probs they read.

    `max_response_len` (tokens) is the constant that the `constant` reduction divides by. `temperature` is
    the one the rollout sampled at: trainer and engine log-probs are only comparable under the same one.
    """

    loss_type: LossType = "policy_loss"
    advantage_estimator: str = "grpo"
    disable_rewards_normalization: bool = False
    disable_grpo_std_normalization: bool = False
    rewards_are_normalized: bool = False
    """A function of the user's stood in place of the group normalisation."""
    normalize_advantages: bool = False
    gamma: float = 1.0
    lambd: float = 1.0
    kl_coef: float = 0.0
    use_kl_loss: bool = False
    use_rollout_logprobs: bool = False
    calculate_per_token_loss: bool = False
    observe_training_entropy: bool = False
    temperature: float = 1.0
    max_response_len: int | None = None
    policy: PolicyLossSettings = field(default_factory=PolicyLossSettings)
    opd_kl_coef: float | None = None
    """Weight of the reverse KL to a teacher in the advantages; None: there is no teacher."""
    custom_loss: CustomLoss | None = None
    custom_advantages: CustomAdvantages | None = None
    custom_reducer: CustomReducer | None = None

    @property
    def estimator(self) -> Estimator:
        """The advantage estimator by name."""
        if self.advantage_estimator not in ESTIMATORS:
            raise MilesError(
                f"unknown advantage estimator {self.advantage_estimator!r}",
                where="algorithm.advantage_estimator",
                fix=f"choose one of: {', '.join(ESTIMATORS)}",
            )
        return ESTIMATORS[self.advantage_estimator]

    @property
    def reduction(self) -> Reduction:
        """How token losses become one number."""
        if self.loss_type != "sft_loss" and self.estimator.constant_divisor:
            return "constant"
        return "token_mean" if self.calculate_per_token_loss else "rollout_mean"

    @property
    def needs_reference(self) -> bool:
        """Whether a KL term reads a reference model."""
        return self.loss_type != "sft_loss" and (self.use_kl_loss or self.kl_coef != 0)

    @property
    def needs_values(self) -> bool:
        """Whether advantages read a critic."""
        own = self.custom_advantages is not None
        return self.loss_type != "sft_loss" and not own and self.estimator.uses_values

    @property
    def needs_entropy(self) -> bool:
        """Whether the forward computes entropies."""
        return self.observe_training_entropy or self.policy.entropy_coef != 0


@dataclass(frozen=True)
class FaultInjection:
    """A fault put in on purpose, to test and show diagnosis: `nan_grad` sets one gradient element to NaN."""

    kind: Literal["nan_grad"]
    step: int
    """Optimizer steps taken before the faulty one."""
    tensor: str | None = None
    """Published name of the tensor; None takes the first of the middle layer."""


@dataclass(frozen=True)
class TrainerSettings:
    """Everything a trainer needs besides the model and the data.

    One of `max_tokens_per_micro_batch` (rows) and `micro_batch_size` (sequences) cuts a step into micro-
    batches; with neither, the step is one. `replay_routes` replays the engine's expert choices (R3)
    wherever the batch carries them. `probe_tokens` bounds the forward that measures, once per step, the
    log-prob gap without replay. In backward the first `recompute_num_layers` layers run again, and of every
    layer the `recompute_modules`. `log_probs_chunk_size`: tokens whose logits exist at once; None lets the
    head choose. `train_mtp` trains the model's MTP layers along, to guess `mtp_training_steps` tokens ahead
    (`native.draft`). `precision`: what the forward of policy and reference rounds to; None: nothing.
    """

    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    algorithm: AlgorithmSettings = field(default_factory=AlgorithmSettings)
    num_steps_per_rollout: int = 1
    max_tokens_per_micro_batch: int | None = None
    micro_batch_size: int | None = None
    replay_routes: bool = True
    probe_tokens: int = 256
    recompute_num_layers: int = 0
    recompute_modules: frozenset[RecomputedModule] = frozenset()
    log_probs_chunk_size: int | None = None
    moe_aux_loss_coeff: float = 0.0
    train_mtp: bool = False
    mtp_training_steps: int = 1
    mtp_loss_scaling_factor: float = 0.2
    non_finite_policy: NonFinitePolicy = "skip"
    fault: FaultInjection | None = None
    precision: PrecisionPolicy | None = None
    critic: CriticSettings | None = None
    """Its optimizer is the policy's but for the learning rate, and its forward rounds nothing."""

    @property
    def needs_old_log_probs_pass(self) -> bool:
        """Whether old log-probs take a forward of their own before the update.

        With one optimizer step per rollout the old policy is the one being differentiated, and the training
        forward gives them; unless something reads those of the whole step: advantages (a KL penalty in the
        reward, a teacher), or importance weights of mean 1.
        """
        if self.algorithm.opd_kl_coef is not None and not self.algorithm.use_rollout_logprobs:
            return True
        if self.algorithm.kl_coef != 0 or self.algorithm.policy.normalizes_weights:
            return True
        return self.num_steps_per_rollout > 1 and not self.algorithm.use_rollout_logprobs

    def validate(self) -> None:
        """Raise MilesError for settings that contradict each other."""
        for what, broken in _CONTRADICTIONS:
            if broken(self):
                raise MilesError(what, where="trainer settings")


_CONTRADICTIONS: tuple[tuple[str, Callable[[TrainerSettings], bool]], ...] = (
    (
        "the advantage estimator is defined with another policy objective than policy.objective",
        lambda s: s.algorithm.policy.objective != s.algorithm.estimator.objective,
    ),
    (
        "the advantage estimator needs a critic, or there is one that nothing needs",
        lambda s: s.algorithm.needs_values != (s.critic is not None),
    ),
    (
        "kl_coef and kl_loss_coef are both non-zero: the KL would count twice",
        lambda s: s.algorithm.kl_coef != 0 and s.algorithm.policy.kl_loss_coef != 0,
    ),
    (
        "kl_coef is non-zero, but the advantage estimator has no KL penalty in its reward",
        lambda s: s.algorithm.kl_coef != 0 and not s.algorithm.estimator.uses_kl_penalty,
    ),
    (
        "kl_loss_coef is non-zero, but use_kl_loss is off",
        lambda s: s.algorithm.policy.kl_loss_coef != 0 and not s.algorithm.use_kl_loss,
    ),
    (
        "use_rollout_logprobs makes every importance weight 1: an importance correction has no effect",
        lambda s: s.algorithm.use_rollout_logprobs and s.algorithm.policy.reads_rollout_log_probs,
    ),
    (
        "max_tokens_per_micro_batch and micro_batch_size both cut the step: choose one",
        lambda s: s.max_tokens_per_micro_batch is not None and s.micro_batch_size is not None,
    ),
    (
        "the estimator divides by a constant length: max_response_len is required",
        lambda s: s.algorithm.reduction == "constant" and s.algorithm.max_response_len is None,
    ),
    (
        "a decaying learning rate needs lr_decay_iters",
        lambda s: s.schedule.lr_decay_style != "constant" and s.schedule.lr_decay_iters is None,
    ),
    (
        "temperature must be positive: a greedy rollout reports log-probs at temperature 1",
        lambda s: s.algorithm.temperature <= 0,
    ),
)
"""What must not hold, and the rule in words."""
