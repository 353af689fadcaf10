"""From the run file to the algorithm: advantages, loss, and what is done about off-policy data."""

from __future__ import annotations

from miles.algorithms.corrections import CustomCorrection
from miles.algorithms.importance import ImportanceCorrection
from miles.algorithms.losses import PolicyLossSettings
from miles.algorithms.policy_objective import ClipRange
from miles.algorithms.rejection import Rejection
from miles.config import RunConfig
from miles.orchestration.algorithm_hooks import (
    custom_advantages,
    custom_correction,
    custom_loss,
    custom_reducer,
)
from miles.planning.plan import Plan
from miles.training.settings import AlgorithmSettings


def algorithm_settings(config: RunConfig, plan: Plan) -> AlgorithmSettings:
    """What the trainer is told of the algorithm."""
    algorithm = config.algorithm
    own_loss = algorithm.custom_loss_function_path
    own_advantages = algorithm.custom_advantage_function_path
    own_reducer = algorithm.custom_pg_loss_reducer_function_path
    by_token = algorithm.calculate_per_token_loss
    return AlgorithmSettings(
        loss_type=algorithm.loss_type,
        advantage_estimator=algorithm.advantage_estimator,
        disable_rewards_normalization=algorithm.disable_rewards_normalization,
        disable_grpo_std_normalization=algorithm.disable_grpo_std_normalization,
        rewards_are_normalized=config.reward.custom_reward_post_process_path is not None,
        normalize_advantages=algorithm.normalize_advantages,
        gamma=algorithm.gamma,
        lambd=algorithm.lambd,
        kl_coef=algorithm.kl_coef,
        use_kl_loss=algorithm.use_kl_loss,
        use_rollout_logprobs=algorithm.use_rollout_logprobs,
        calculate_per_token_loss=by_token,
        observe_training_entropy=algorithm.observe_training_entropy,
        temperature=config.rollout.rollout_temperature or 1.0,
        max_response_len=plan.max_response_len,
        policy=_policy_loss(config),
        opd_kl_coef=config.distillation.opd_kl_coef if config.distillation.use_opd else None,
        custom_loss=None if own_loss is None else custom_loss(own_loss, config),
        custom_advantages=None if own_advantages is None else custom_advantages(own_advantages, config),
        custom_reducer=None if own_reducer is None else custom_reducer(own_reducer, by_token),
    )


def _policy_loss(config: RunConfig) -> PolicyLossSettings:
    algorithm = config.algorithm
    high = algorithm.eps_clip if algorithm.eps_clip_high is None else algorithm.eps_clip_high
    objectives = {"gspo": "sequence_clip", "cispo": "cispo"}
    return PolicyLossSettings(
        objective=objectives.get(algorithm.advantage_estimator, "clip"),  # type: ignore[arg-type]
        clip=ClipRange(algorithm.eps_clip, high, algorithm.eps_clip_c),
        kl_loss_coef=algorithm.kl_loss_coef if algorithm.use_kl_loss else 0.0,
        kl_loss_type=algorithm.kl_loss_type,
        use_unbiased_kl=algorithm.use_unbiased_kl,
        entropy_coef=algorithm.entropy_coef,
        correction=_correction(config),
        rejection=_rejection(config),
        mismatch_metrics=config.correction.get_mismatch_metrics,
        custom_correction=_custom_correction(config),
        opsm_delta=algorithm.opsm_delta if algorithm.use_opsm else None,
    )


def _correction(config: RunConfig) -> ImportanceCorrection | None:
    given = config.correction
    if given.custom_tis_function_path or not (given.use_tis or given.get_mismatch_metrics):
        return None
    correction = ImportanceCorrection(
        given.tis_clip_low,
        given.tis_clip,
        outside="mask" if given.tis_mode == "mask" else "clamp",
        level=given.tis_level,
        batch_normalize=given.tis_batch_normalize,
        applied=given.use_tis,
    )
    return correction if given.tis_threshold is None else correction.within(given.tis_threshold)


def _rejection(config: RunConfig) -> Rejection | None:
    given = config.correction
    if given.custom_tis_function_path or not (given.use_rs or given.get_mismatch_metrics):
        return None
    bounds = given.rs_lower_bound, given.rs_upper_bound
    return Rejection(given.rs_level, *bounds, veto=given.rs_veto_threshold, applied=given.use_rs)


def _custom_correction(config: RunConfig) -> CustomCorrection | None:
    path = config.correction.custom_tis_function_path
    return None if path is None else custom_correction(path, config)
