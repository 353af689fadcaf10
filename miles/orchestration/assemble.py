"""From the run file and the plan to the settings of each worker."""

from __future__ import annotations

import re
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch

from miles.arch import ArchSpec
from miles.arch.precision import PrecisionPolicy
from miles.config import RunConfig
from miles.data.prompts import PromptFormat, PromptKeys
from miles.data.rows import parse_data_path
from miles.data.source import PromptSource, SourceSettings
from miles.data.tasks import is_builtin, resolve_builtin
from miles.data.tokenizer import CheckpointTokenizer
from miles.models.compiled.exact import CompiledExactNumerics
from miles.models.compiled.library import Library
from miles.models.compiled.numerics import CompiledNumerics
from miles.models.invariance import find_exact_numerics
from miles.models.numerics import FAST, Numerics
from miles.models.recompute import RECOMPUTED_MODULES
from miles.orchestration.algorithm_settings import algorithm_settings
from miles.orchestration.decode_kernel import train_library
from miles.orchestration.rollout_worker import EvalSet
from miles.planning.critic import critic_only_rollouts, trains_critic
from miles.planning.facts import eval_sets
from miles.planning.plan import Plan
from miles.planning.recompute import plan_recompute
from miles.planning.speculation import mtp_training_steps
from miles.precision.weight_format import PLAIN
from miles.rollout.collect import CollectSettings
from miles.rollout.engine import SamplingParams
from miles.rollout.filters import check_reward_nonzero_std
from miles.rollout.generate import GenerationSettings
from miles.rollout.native.draft import SpeculationSettings
from miles.rollout.native.engine import EngineSettings
from miles.rollout.sglang.engine import SglangSettings
from miles.rollout.staleness import FlowSettings
from miles.training.megatron.layout import Implementation, MegatronLayout
from miles.training.megatron.options import MegatronOptions
from miles.training.settings import (
    CriticSettings,
    FaultInjection,
    OptimizerSettings,
    ScheduleSettings,
    TrainerSettings,
)

DTYPES = PLAIN
"""What weights are computed in."""


def trainer_settings(config: RunConfig, plan: Plan, spec: ArchSpec) -> TrainerSettings:
    """What a trainer is told."""
    training, optimizer, replay = config.training, config.optimizer, plan.routing_replay
    recompute = plan_recompute(config, spec.num_layers)
    return TrainerSettings(
        optimizer=OptimizerSettings(
            lr=optimizer.lr,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.adam_beta1,
            adam_beta2=optimizer.adam_beta2,
            adam_eps=optimizer.adam_eps,
            clip_grad=optimizer.clip_grad,
        ),
        schedule=_schedule(config, plan),
        algorithm=algorithm_settings(config, plan),
        num_steps_per_rollout=plan.batch.steps_per_rollout,
        max_tokens_per_micro_batch=_tokens_over_context(config, plan),
        micro_batch_size=None if plan.micro_batch_tokens is not None else plan.micro_batch_size,
        replay_routes=replay,
        recompute_num_layers=recompute.layers,
        recompute_modules=frozenset(module for module in RECOMPUTED_MODULES if module in recompute.modules),
        log_probs_chunk_size=training.log_probs_chunk_size if training.log_probs_chunk_size > 0 else None,
        moe_aux_loss_coeff=training.moe_aux_loss_coeff,
        train_mtp=config.speculative.enable_mtp_training,
        mtp_training_steps=mtp_training_steps(config),
        mtp_loss_scaling_factor=config.speculative.mtp_loss_scaling_factor,
        non_finite_policy=training.non_finite_policy,
        fault=_fault(config.debug.inject_fault, plan.batch.steps_per_rollout),
        precision=None if plan.precision.training.is_plain else plan.precision,
        critic=_critic(config, plan) if trains_critic(config) else None,
    )


def _tokens_over_context(config: RunConfig, plan: Plan) -> int | None:
    """The budget is that of a device; the sequences of a micro-batch lie on all context-parallel ranks."""
    tokens = plan.micro_batch_tokens
    return None if tokens is None else tokens * config.parallel.context_parallel_size


def megatron_layout(config: RunConfig, device: str) -> MegatronLayout:
    """How the Megatron trainer cuts the model over its processes, and whose layers it takes."""
    parallel = config.parallel
    implementation = config.training.transformer_impl or LAYERS[device]
    return MegatronLayout(
        tp=parallel.tensor_model_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        cp=parallel.context_parallel_size,
        ep=parallel.expert_model_parallel_size,
        etp=parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size,
        virtual_stage_layers=parallel.num_layers_per_virtual_pipeline_stage,
        first_stage_layers=parallel.decoder_first_pipeline_num_layers,
        last_stage_layers=parallel.decoder_last_pipeline_num_layers,
        sequence_parallel=parallel.sequence_parallel,
        implementation=implementation,
        dispatcher=config.training.moe_token_dispatcher_type,
        options=_cpu_options(config) if device == "cpu" else _gpu_options(config),
    )


LAYERS: dict[str, Implementation] = {"cpu": "local", "cuda": "transformer_engine"}
"""Whose layers the Megatron trainer takes where the run file does not say."""


def _cpu_options(config: RunConfig) -> MegatronOptions:
    parallel = config.parallel
    return MegatronOptions(
        distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )


def _gpu_options(config: RunConfig) -> MegatronOptions:
    training, parallel, optimizer, precision = (
        config.training,
        config.parallel,
        config.optimizer,
        config.precision,
    )
    return MegatronOptions(
        attention_backend=training.attention_backend,
        softmax_in_fp32=training.attention_softmax_in_fp32,
        deepep=training.moe_enable_deepep,
        fp8_format=precision.fp8_format,
        fp8_recipe=precision.fp8_recipe,
        first_bf16=precision.num_layers_at_start_in_bf16,
        last_bf16=precision.num_layers_at_end_in_bf16,
        grads_in_fp32=training.accumulate_allreduce_grads_in_fp32,
        distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        precision_aware=optimizer.use_precision_aware_optimizer,
        cpu_offload=optimizer.optimizer_cpu_offload,
        overlap_offload=optimizer.overlap_cpu_optimizer_d2h_h2d,
    )


def numerics(plan: Plan, spec: ArchSpec) -> Numerics:
    """How both sides compute. Exact numerics that are not compiled are measured on this machine, once per
    process.

    Raises PreflightRefused where there are none. Call it with torch's threads as the run has them.
    """
    library = train_library(plan)
    if library is not None:
        return _compiled_numerics(library, plan.numerics)
    if plan.numerics == "fast":
        return FAST
    return _exact_numerics(spec, plan.dtype, plan.device, torch.get_num_threads())


@cache
def _compiled_numerics(library: Path, mode: str) -> Numerics:
    made = CompiledExactNumerics if mode == "exact" else CompiledNumerics
    return made(Library(library))


@cache
def _exact_numerics(spec: ArchSpec, dtype: str, device: str, threads: int) -> Numerics:
    return find_exact_numerics(spec, DTYPES[dtype], device)


def engine_settings(
    config: RunConfig, plan: Plan, numerics: Numerics, decode_library: Path | None = None
) -> EngineSettings:
    """What the native engine is told. `decode_library`: the compiled kernel of a plan that has one."""
    return EngineSettings(
        max_context_len=plan.max_context_len,
        seed=config.rollout.rollout_seed,
        max_running_requests=plan.engine_limits.running_requests,
        max_prefill_tokens=plan.engine_limits.prefill_tokens,
        max_total_tokens=plan.engine_limits.kv_tokens,
        captured_requests=plan.engine_limits.captured_requests,
        dtype=DTYPES.get(plan.rollout_format, DTYPES[plan.dtype]),
        device=plan.device,
        numerics=numerics,
        precision=engine_precision(plan),
        keep_expanded=plan.device == "cpu",
        decode_library=decode_library,
        speculation=None if plan.speculation is None else SpeculationSettings(**asdict(plan.speculation)),
    )


def sglang_settings(config: RunConfig, plan: Plan) -> SglangSettings:
    """What the client of an SGLang server is told."""
    sync = config.weight_sync
    return SglangSettings(
        max_context_len=plan.max_context_len,
        return_routed_experts=plan.routing_replay,
        tensor_parallel_size=int((plan.server_args or {}).get("tp_size", 1)),
        bucket_bytes=sync.update_weight_buffer_size,
        pause_mode=sync.pause_generation_mode,
        repacks=plan.rollout_format == "int4",
    )


def engine_precision(plan: Plan) -> PrecisionPolicy | None:
    """What becomes of weights on their way to the engine; None: it serves the trainer's own."""
    return None if plan.rollout_format == plan.dtype else plan.precision


def generation_settings(config: RunConfig, plan: Plan, stop_token_ids: tuple[int, ...]) -> GenerationSettings:
    """How training samples are drawn."""
    rollout = config.rollout
    sampling = SamplingParams(
        max_new_tokens=plan.max_response_len,
        temperature=rollout.rollout_temperature,
        top_p=rollout.rollout_top_p,
        top_k=rollout.rollout_top_k,
        stop_token_ids=stop_token_ids,
        stop=rollout.rollout_stop,
    )
    return GenerationSettings(
        sampling=sampling,
        max_context_len=plan.max_context_len,
        mask_off_policy=rollout.mask_offpolicy_in_partial_rollout,
        speculative_num_steps=None if plan.speculation is None else plan.speculation.num_steps,
    )


def collect_settings(config: RunConfig, plan: Plan) -> CollectSettings:
    """How many groups a rollout needs, and which are dropped."""
    rollout = config.rollout
    filters = {"check_reward_nonzero_std": check_reward_nonzero_std(config.reward.reward_key)}
    name = rollout.dynamic_sampling_filter_path
    return CollectSettings(
        rollout_batch_size=plan.batch.rollout_batch_size,
        over_sampling_batch_size=rollout.over_sampling_batch_size or plan.batch.rollout_batch_size,
        dynamic_filter=None if name is None else filters[name],
        reward_key=config.reward.reward_key,
        keep_unused=rollout.partial_rollout,
    )


def flow_settings(config: RunConfig, plan: Plan) -> FlowSettings:
    """How much is begun where engines never pause; by default a batch is in flight."""
    rollout, batch = config.rollout, plan.batch.rollout_batch_size
    samples = rollout.async_max_concurrent_samples
    return FlowSettings(
        rollout_batch_size=batch,
        max_in_flight=batch if samples is None else samples // plan.batch.n_samples_per_prompt,
        capacity=int(rollout.async_data_buffer_capacity_factor * batch),
        max_staleness=rollout.max_weight_staleness,
        retry_stale=rollout.async_unused_samples_handler == "retry",
    )


def prompt_source(config: RunConfig, plan: Plan, tokenizer: CheckpointTokenizer) -> PromptSource:
    """The stream of training prompts."""
    data, rollout = config.data, config.rollout
    assert data.prompt_data is not None, "preflight asks for prompts"
    return PromptSource(
        parse_data_path(locate_data(data.prompt_data)),
        _prompt_format(config, tokenizer),
        SourceSettings(
            keys=PromptKeys(data.input_key, data.label_key, data.metadata_key, data.tool_key),
            shuffle=data.rollout_shuffle,
            seed=rollout.rollout_seed,
            max_prompt_len=rollout.rollout_max_prompt_len,
            on_bad_row=data.on_bad_row,
            n_samples_per_prompt=plan.batch.n_samples_per_prompt,
        ),
    )


def evaluation_sets(
    config: RunConfig, plan: Plan, tokenizer: CheckpointTokenizer, stop_token_ids: tuple[int, ...]
) -> list[EvalSet]:
    """The held-out sets; what `[eval]` leaves open is as in training."""
    return [
        _evaluation_set(config, plan, tokenizer, stop_token_ids, name, path)
        for name, path in eval_sets(config)
    ]


def _evaluation_set(
    config: RunConfig,
    plan: Plan,
    tokenizer: CheckpointTokenizer,
    stop_token_ids: tuple[int, ...],
    name: str,
    path: str,
) -> EvalSet:
    data, rollout, held_out = config.data, config.rollout, config.eval
    keys = PromptKeys(
        held_out.eval_input_key or data.input_key,
        held_out.eval_label_key or data.label_key,
        data.metadata_key,
        held_out.eval_tool_key or data.tool_key,
    )
    longest = held_out.eval_max_prompt_len or rollout.rollout_max_prompt_len
    source = PromptSource(
        parse_data_path(locate_data(path)),
        _prompt_format(config, tokenizer),
        SourceSettings(keys=keys, max_prompt_len=longest),
    )

    def generation(temperature: float, top_p: float, top_k: int) -> GenerationSettings:
        sampling = SamplingParams(
            max_new_tokens=held_out.eval_max_response_len or plan.max_response_len,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop_token_ids=stop_token_ids,
            stop=rollout.rollout_stop,
            min_new_tokens=held_out.eval_min_new_tokens,
        )
        limit = held_out.eval_max_context_len or plan.max_context_len
        return GenerationSettings(sampling=sampling, max_context_len=limit, return_routed_experts=False)

    sampled = generation(
        rollout.rollout_temperature if held_out.eval_temperature is None else held_out.eval_temperature,
        held_out.eval_top_p or rollout.rollout_top_p,
        held_out.eval_top_k or rollout.rollout_top_k,
    )
    greedy = generation(0.0, 1.0, -1) if held_out.eval_greedy else None
    return EvalSet(name, source, held_out.n_samples_per_eval_prompt, sampled, greedy)


def locate_data(path: str) -> str:
    """A data path with a built-in name replaced by the file behind it; a slice stays."""
    if not is_builtin(path):
        return path
    name, bracket, rest = path.partition("@[")
    return f"{resolve_builtin(name)}{bracket}{rest}"


def stop_tokens(config: RunConfig, spec: ArchSpec, tokenizer: CheckpointTokenizer) -> tuple[int, ...]:
    """Ids that end a response: the checkpoint's own and the run file's."""
    own = spec.eos_token_ids or ((tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ())
    return tuple(dict.fromkeys((*own, *config.rollout.rollout_stop_token_ids)))


def load_tokenizer(config: RunConfig, checkpoint: Path) -> CheckpointTokenizer:
    """The checkpoint's tokenizer, with the run file's chat template where it names one."""
    template = config.data.chat_template_path
    return CheckpointTokenizer(checkpoint, Path(template) if template else None)


def _prompt_format(config: RunConfig, tokenizer: CheckpointTokenizer) -> PromptFormat:
    return PromptFormat(tokenizer, config.data.apply_chat_template, config.data.apply_chat_template_kwargs)


def _schedule(config: RunConfig, plan: Plan) -> ScheduleSettings:
    optimizer = config.optimizer
    alone = critic_only_rollouts(config) * plan.batch.steps_per_rollout
    return ScheduleSettings(
        lr_decay_style=optimizer.lr_decay_style,
        lr_warmup_iters=optimizer.lr_warmup_iters,
        # In a run of the critic alone nothing reads it.
        lr_decay_iters=optimizer.lr_decay_iters or max(1, plan.optimizer_steps - alone),
        min_lr=optimizer.min_lr,
    )


def _critic(config: RunConfig, plan: Plan) -> CriticSettings:
    """Shape and floor of its learning rate are the policy's; it learns from all rollouts."""
    critic, optimizer = config.critic, config.optimizer
    return CriticSettings(
        lr=optimizer.lr if critic.critic_lr is None else critic.critic_lr,
        schedule=ScheduleSettings(
            lr_decay_style=optimizer.lr_decay_style,
            lr_warmup_iters=critic.critic_lr_warmup_iters,
            lr_decay_iters=optimizer.lr_decay_iters or plan.optimizer_steps,
            min_lr=optimizer.min_lr,
        ),
        value_clip=critic.value_clip,
        num_critic_only_steps=critic.num_critic_only_steps,
    )


def _fault(text: str | None, steps_per_rollout: int) -> FaultInjection | None:
    """The trainer's fault, in the first optimizer step of the run's step `kind@step`, counted from 1."""
    match = re.fullmatch(r"nan_grad@(\d+)", text or "")
    if match is None:
        return None  # none, or one of the engine's side
    return FaultInjection("nan_grad", (int(match[1]) - 1) * steps_per_rollout)
