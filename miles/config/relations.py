"""How settings depend on each other, as tables that `validation.py` reads."""

from __future__ import annotations

MEASURED = "correction.get_mismatch_metrics"

NEEDS: dict[str, str | tuple[str, ...]] = {
    "correction.custom_tis_function_path": "correction.use_tis",
    "algorithm.kl_loss_coef": "algorithm.use_kl_loss",
    "algorithm.use_unbiased_kl": "algorithm.use_kl_loss",
    "algorithm.opsm_delta": "algorithm.use_opsm",
    "algorithm.ref_update_interval": ("algorithm.use_kl_loss", "algorithm.kl_coef"),
    "correction.tis_threshold": ("correction.use_tis", MEASURED),
    "correction.tis_clip": ("correction.use_tis", MEASURED),
    "correction.tis_clip_low": ("correction.use_tis", MEASURED),
    "correction.tis_mode": ("correction.use_tis", MEASURED),
    "correction.tis_level": ("correction.use_tis", MEASURED),
    "correction.tis_batch_normalize": "correction.use_tis",
    "correction.rs_level": ("correction.use_rs", MEASURED),
    "correction.rs_lower_bound": ("correction.use_rs", MEASURED),
    "correction.rs_upper_bound": ("correction.use_rs", MEASURED),
    "correction.rs_veto_threshold": ("correction.use_rs", MEASURED),
    "data.apply_chat_template_kwargs": "data.apply_chat_template",
    "data.chat_template_path": "data.apply_chat_template",
    "distillation.opd_type": "distillation.use_opd",
    "distillation.opd_kl_coef": "distillation.use_opd",
    "distillation.opd_teacher_load": "distillation.use_opd",
    "distillation.opd_teacher_urls": "distillation.use_opd",
    "distillation.opd_teacher_key": "distillation.opd_teacher_urls",
    "fault_tolerance.rollout_health_check_interval": "fault_tolerance.use_fault_tolerance",
    "fault_tolerance.rollout_health_check_timeout": "fault_tolerance.use_fault_tolerance",
    "fault_tolerance.rollout_health_check_first_wait": "fault_tolerance.use_fault_tolerance",
    "optimizer.overlap_cpu_optimizer_d2h_h2d": "optimizer.optimizer_cpu_offload",
    "parallel.overlap_param_gather": "parallel.use_distributed_optimizer",
    "precision.fp8_recipe": "precision.fp8_format",
    "precision.fp8_param_gather": "precision.fp8_format",
    "precision.fp4_recipe": "precision.fp4_format",
    "precision.int4_group_size": "precision.int4_qat",
    "record.tb_project_name": "record.use_tensorboard",
    "record.tb_experiment_name": "record.use_tensorboard",
    "record.wandb_mode": "record.use_wandb",
    "record.wandb_project": "record.use_wandb",
    "record.wandb_group": "record.use_wandb",
    "record.wandb_team": "record.use_wandb",
    "record.wandb_host": "record.use_wandb",
    "record.mlflow_tracking_uri": "record.use_mlflow",
    "record.mlflow_experiment_name": "record.use_mlflow",
    "record.prometheus_port": "record.use_prometheus",
    "reward.overlong_penalty_factor": "reward.overlong_buffer_len",
    "rollout.buffer_filter_path": "rollout.partial_rollout",
    "rollout.mask_offpolicy_in_partial_rollout": "rollout.partial_rollout",
    "rollout.max_weight_staleness": "rollout.fully_async",
    "rollout.async_max_concurrent_samples": "rollout.fully_async",
    "rollout.async_data_buffer_capacity_factor": "rollout.fully_async",
    "rollout.async_unused_samples_handler": "rollout.fully_async",
    "sglang.speculative_num_steps": "sglang.speculative_algorithm",
    "sglang.speculative_eagle_topk": "sglang.speculative_algorithm",
    "sglang.speculative_num_draft_tokens": "sglang.speculative_algorithm",
    "sglang.speculative_draft_model_path": "sglang.speculative_algorithm",
    "speculative.enable_mtp_training": "speculative.mtp_num_layers",
    "speculative.mtp_training_steps": "speculative.enable_mtp_training",
    "training.use_dynamic_batch_size": "training.max_tokens_per_gpu",
    "training.recompute_method": "training.recompute_granularity",
    "training.recompute_num_layers": "training.recompute_granularity",
    "training.recompute_modules": "training.recompute_granularity",
    "debug.load_debug_rollout_data_subsample": "debug.load_debug_rollout_data",
}
"""Left has no effect, or cannot work, without right, or without one of those on the right."""

OWN_CORRECTION = "a function of yours stands in place of the built-in correction"

EXCLUSIVE = (
    (
        "algorithm.kl_coef",
        "algorithm.kl_loss_coef",
        "the KL penalty belongs in the reward or in the loss",
    ),
    (
        "correction.use_tis",
        "algorithm.use_rollout_logprobs",
        "with the engine's log-probs as the old policy, every importance weight is 1",
    ),
    (
        "correction.use_rs",
        "algorithm.use_rollout_logprobs",
        "with the engine's log-probs as the old policy, every importance weight is 1",
    ),
    (
        MEASURED,
        "algorithm.use_rollout_logprobs",
        "with the engine's log-probs as the old policy, every importance weight is 1",
    ),
    ("correction.custom_tis_function_path", "correction.use_rs", OWN_CORRECTION),
    ("correction.custom_tis_function_path", "correction.tis_mode", OWN_CORRECTION),
    ("correction.custom_tis_function_path", "correction.tis_level", OWN_CORRECTION),
    ("correction.custom_tis_function_path", "correction.tis_batch_normalize", OWN_CORRECTION),
    ("correction.tis_threshold", "correction.tis_mode", "the threshold is a mask by itself"),
    (
        "correction.tis_threshold",
        "correction.tis_clip",
        "the threshold masks weights outside [T, 1/T], tis_clip cuts them",
    ),
    (
        "correction.tis_threshold",
        "correction.tis_clip_low",
        "the threshold masks, tis_clip_low raises",
    ),
    (
        "algorithm.custom_advantage_function_path",
        "algorithm.kl_coef",
        "a function of yours makes all of the advantage",
    ),
    (
        "algorithm.custom_advantage_function_path",
        "reward.custom_reward_post_process_path",
        "a function of yours makes all of the advantage",
    ),
    (
        "algorithm.custom_loss_function_path",
        "algorithm.custom_pg_loss_reducer_function_path",
        "a loss of yours is reduced by itself",
    ),
    (
        "algorithm.custom_loss_function_path",
        "correction.use_tis",
        "a loss of yours has the engine's log-probs and corrects by itself",
    ),
    (
        "algorithm.custom_loss_function_path",
        MEASURED,
        "what a loss of yours measures is its own",
    ),
    (
        "algorithm.custom_loss_function_path",
        "correction.use_rs",
        "a loss of yours has the engine's log-probs and corrects by itself",
    ),
    (
        "reward.custom_reward_post_process_path",
        "reward.overlong_buffer_len",
        "a function of yours makes all of the reward that is trained on",
    ),
    (
        "reward.custom_reward_post_process_path",
        "algorithm.disable_rewards_normalization",
        "the function stands in place of the normalisation",
    ),
    ("distillation.opd_teacher_load", "cluster.colocate", "a teacher stays on the trainer's GPUs"),
    ("rollout.num_rollout", "rollout.num_epoch", "each of them gives the length of the run"),
    ("rollout.one_step_ahead", "rollout.fully_async", "they are two different schedules"),
    (
        "cluster.colocate",
        "rollout.one_step_ahead",
        "colocated trainer and engines take turns",
    ),
    ("cluster.colocate", "rollout.fully_async", "colocated trainer and engines take turns"),
    (
        "alignment.true_on_policy_mode",
        "rollout.one_step_ahead",
        "samples of older weights cannot agree with the weights that learn from them",
    ),
    (
        "alignment.true_on_policy_mode",
        "rollout.fully_async",
        "samples of older weights cannot agree with the weights that learn from them",
    ),
    (
        "rollout.partial_rollout",
        "rollout.fully_async",
        "nobody is cut off at the end of a rollout: requests go on under new weights",
    ),
    (
        "rollout.over_sampling_batch_size",
        "rollout.fully_async",
        "groups begin one by one, as others are finished or filtered",
    ),
    (
        "training.use_dynamic_batch_size",
        "training.micro_batch_size",
        "a token budget or a sample count decides",
    ),
    ("precision.bf16", "precision.fp16", "a run has one type of weights"),
    ("precision.fp8_format", "precision.fp4_format", "a run has one low-precision format for training"),
    ("precision.fp8_format", "precision.int4_qat", "a run has one low-precision format for training"),
    ("precision.fp4_format", "precision.int4_qat", "a run has one low-precision format for training"),
    ("debug.debug_rollout_only", "debug.debug_train_only", "nothing would be left to do"),
    (
        "alignment.true_on_policy_mode",
        "correction.use_tis",
        "trainer and engine agree: every weight is 1",
    ),
    (
        "alignment.true_on_policy_mode",
        "correction.use_rs",
        "trainer and engine agree: every weight is 1",
    ),
)
"""Pairs that cannot both be in force."""

MERELY_WRITTEN = (
    "correction.tis_clip",
    "correction.tis_clip_low",
    "correction.tis_mode",
    "correction.tis_level",
    "training.micro_batch_size",
)
"""Settings whose default is itself a choice: written down at all, they contradict their counterpart."""

ORDERED = (
    ("correction.tis_clip_low", "correction.tis_clip"),
    ("correction.rs_lower_bound", "correction.rs_upper_bound"),
    ("optimizer.min_lr", "optimizer.lr"),
    ("reward.overlong_buffer_len", "rollout.rollout_max_response_len"),
    ("rollout.rollout_batch_size", "rollout.over_sampling_batch_size"),
    ("rollout.n_samples_per_prompt", "rollout.async_max_concurrent_samples"),
    ("rollout.rollout_max_prompt_len", "rollout.rollout_max_context_len"),
    ("eval.eval_max_prompt_len", "eval.eval_max_context_len"),
)
"""Left is at most right."""

HOOKS = (
    "reward.custom_rm_path",
    "reward.custom_reward_post_process_path",
    "rollout.custom_generate_function_path",
    "rollout.rollout_sample_filter_path",
    "correction.custom_tis_function_path",
    "algorithm.custom_loss_function_path",
    "algorithm.custom_advantage_function_path",
    "algorithm.custom_pg_loss_reducer_function_path",
    "rollout.buffer_filter_path",
)
"""Settings that name a user function."""
