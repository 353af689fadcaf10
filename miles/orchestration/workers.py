"""The parts of the ring, built from a job: every executor puts the same ones together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from miles.arch import ArchSpec
from miles.config import RunConfig
from miles.data.hooks import load_hook
from miles.data.tokenizer import CheckpointTokenizer
from miles.diagnosis.live import SAMPLING_SETTINGS
from miles.diagnosis.monitor import Monitor
from miles.models.allocator import keep_freed_memory
from miles.orchestration import assemble
from miles.orchestration.async_rollout import AsyncRolloutWorker
from miles.orchestration.checkpoints import CheckpointStore
from miles.orchestration.critic_start import start_critic
from miles.orchestration.decode_kernel import decode_library
from miles.orchestration.demonstrations import DemonstrationWorker
from miles.orchestration.driver import Driver, RolloutSide, Schedule, TrainSide
from miles.orchestration.held_choice import use_buffer_filter
from miles.orchestration.observer import Observer
from miles.orchestration.reward_shaping import Shaping
from miles.orchestration.rollout_worker import CustomGeneration, RolloutWorker
from miles.orchestration.run_model import read_weights
from miles.orchestration.supervisor import Supervisor
from miles.orchestration.teaching import served_teachers, teach
from miles.orchestration.train_worker import AnyTrainer, TrainWorker
from miles.orchestration.turns import NoTurns, Turns
from miles.orchestration.weight_sync import WeightSync
from miles.record import Inbox, RecordWriter
from miles.rollout.collect import Score
from miles.rollout.custom import Surroundings
from miles.rollout.engine import GenerationClient
from miles.rollout.native.engine import NativeEngine
from miles.training.megatron.trainer import MegatronTrainer
from miles.training.native.gap_watch import GapWatch
from miles.training.native.trainer import NativeTrainer
from miles.training.settings import TrainerSettings

if TYPE_CHECKING:
    from miles.orchestration.job import Job
    from miles.training.native.process_group import DataParallel


def settle_process(threads: int) -> None:
    """Give this process its share of the machine, before the first tensor."""
    torch.set_num_threads(threads)
    keep_freed_memory()


def is_supervised(job: Job) -> bool:
    """Whether the run learns from demonstrations: no engine, no reward."""
    return job.resolved.config.algorithm.loss_type == "sft_loss"


def build_trainer(job: Job, spec: ArchSpec, parallel: DataParallel | None = None) -> TrainWorker:
    """A trainer with the weights that the job starts from, and a reference where the loss needs one.

    `parallel`: its place among the ranks of the trainer.
    """
    config, source = job.resolved.config, job.source
    settings = assemble.trainer_settings(config, job.plan, spec)
    make = _megatron if job.plan.trainer == "megatron" else _native
    trainer = make(job, spec, settings, parallel)
    if source.has_weights:
        trainer.load_weights(read_weights(Path(config.model.load or source.directory), spec))
    else:
        trainer.init_weights(config.run.seed)
    if settings.critic is not None:
        start_critic(trainer, config.critic.critic_load)
    if settings.algorithm.needs_reference:
        reference = read_weights(Path(config.model.ref_load or source.directory), spec.policy)
        trainer.load_weights(reference, model="reference")
    if config.distillation.opd_teacher_load is not None:
        teach(trainer, Path(config.distillation.opd_teacher_load), source.directory)
    watch_gap(job, trainer, None)
    return TrainWorker(trainer, config.reward.reward_key)


def _native(job: Job, spec: ArchSpec, settings: TrainerSettings, parallel: DataParallel | None) -> AnyTrainer:
    return NativeTrainer(
        spec,
        settings,
        dtype=assemble.DTYPES[job.plan.dtype],
        device=job.plan.device,
        source_dir=job.source.directory,
        parallel=parallel,
        numerics=assemble.numerics(job.plan, spec),
    )


def _megatron(
    job: Job, spec: ArchSpec, settings: TrainerSettings, parallel: DataParallel | None
) -> AnyTrainer:
    checkpoint = job.resolved.config.checkpoint
    return MegatronTrainer(
        spec,
        settings,
        assemble.megatron_layout(job.resolved.config, job.plan.device),
        dtype=assemble.DTYPES[job.plan.dtype],
        device=job.plan.device,
        source_dir=job.source.directory,
        parallel=parallel,
        dist_checkpoints=checkpoint.ckpt_format == "torch_dist",
        background_saves=checkpoint.async_save,
    )


def build_engine(job: Job, spec: ArchSpec) -> NativeEngine:
    """An engine without weights."""
    numerics = assemble.numerics(job.plan, spec)
    library, config = decode_library(job.plan), job.resolved.config
    settings = assemble.engine_settings(config, job.plan, numerics, library)
    # A generation function may ask for stop strings in a turn of its own.
    asked = config.rollout.rollout_stop or config.rollout.custom_generate_function_path
    decode = assemble.load_tokenizer(config, job.source.directory).decode if asked else None
    return NativeEngine(spec, settings, decode)


def watch_gap(job: Job, trainer: AnyTrainer, engine: NativeEngine | None) -> None:
    """In true on-policy mode: trace the first token whose log-prob differs to a layer.

    `engine`: the one whose samples are trained on, where it is in the trainer's process.
    """
    config = job.resolved.config
    if config.alignment.true_on_policy_mode:
        assert isinstance(trainer, NativeTrainer), "preflight refuses exact bits with other trainers"
        rescore = None if engine is None else engine.rescore
        temperature = trainer.settings.algorithm.temperature
        trainer.gap_watch = GapWatch(rescore, trainer.settings.replay_routes, temperature)


def build_demonstrations(job: Job, spec: ArchSpec, tokenizer: CheckpointTokenizer) -> DemonstrationWorker:
    """The sampling side of a supervised run."""
    config, plan = job.resolved.config, job.plan
    prompts = assemble.prompt_source(config, plan, tokenizer)
    stop = assemble.stop_tokens(config, spec, tokenizer)[0]
    return DemonstrationWorker(prompts, tokenizer, stop, plan.batch.rollout_batch_size)


def build_sampling(
    job: Job,
    spec: ArchSpec,
    tokenizer: CheckpointTokenizer,
    engine: GenerationClient,
    score: Score,
    eval_score: Score,
) -> RolloutWorker:
    """The sampling side of a run that learns from rewards, around an engine and the reward."""
    config, plan = job.resolved.config, job.plan
    stops = assemble.stop_tokens(config, spec, tokenizer)
    skip_special = config.rollout.rollout_skip_special_tokens
    make: Callable[..., RolloutWorker] = RolloutWorker
    if config.rollout.fully_async:
        make = partial(AsyncRolloutWorker, assemble.flow_settings(config, plan))
    worker = make(
        engine=engine,
        prompts=assemble.prompt_source(config, plan, tokenizer),
        score=score,
        detokenize=lambda ids: tokenizer.decode(ids, skip_special),
        generation=assemble.generation_settings(config, plan, stops),
        settings=assemble.collect_settings(config, plan),
        eval_sets=assemble.evaluation_sets(config, plan, tokenizer, stops),
        eval_score=eval_score,
        eval_reward_key=config.reward.eval_reward_key or config.reward.reward_key,
        custom=_custom_generation(config, engine, tokenizer),
        shaping=Shaping.of(config, plan),
        teachers=served_teachers(config),
    )
    use_buffer_filter(worker.prompts, config, lambda: worker.step)
    return worker


def _custom_generation(
    config: RunConfig, engine: GenerationClient, tokenizer: CheckpointTokenizer
) -> CustomGeneration | None:
    """The function named by `--custom-generate-function-path`."""
    path = config.rollout.custom_generate_function_path
    if path is None:
        return None
    skip_special = config.rollout.rollout_skip_special_tokens
    surroundings = Surroundings(
        config=config,
        engine=engine,
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
        decode=lambda ids: tokenizer.decode(ids, skip_special),
    )
    return load_hook(path, "--custom-generate-function-path"), surroundings


async def build_driver(
    job: Job,
    rollout: RolloutSide,
    trainer: TrainSide,
    weight_sync: WeightSync | None,
    record: RecordWriter,
    supervisor: Supervisor,
    observer: Observer,
    turns: Turns | None = None,
) -> Driver:
    """Put the run's books around both sides, stand where the job resumes, and give the engine its weights."""
    config = job.resolved.config
    store = CheckpointStore(job.checkpoint_root, config.checkpoint.keep_checkpoints)
    driver = Driver(
        schedule=_schedule(job),
        rollout=rollout,
        trainer=trainer,
        weight_sync=weight_sync,
        record=record,
        inbox=Inbox(record),
        store=store,
        supervisor=supervisor,
        observer=observer,
        monitor=Monitor(record, config.model_dump()),
        turns=turns or NoTurns(),
        stream=rollout if isinstance(rollout, AsyncRolloutWorker) else None,
    )
    if job.resume_from is not None:
        patch, state = job.lineage.live_patch, store.load_state(job.resume_from)
        training = {key: value for key, value in patch.items() if key not in SAMPLING_SETTINGS}
        sampling = state.sampling_knobs | {k: v for k, v in patch.items() if k in SAMPLING_SETTINGS}
        if job.plan.speculation is None:
            sampling = {}  # what there was to set is off in this attempt
        await driver.restore(replace(state, sampling_knobs=sampling), job.resume_from, training)
    await driver.hand_over_weights(driver.state.step)
    return driver


def _schedule(job: Job) -> Schedule:
    config = job.resolved.config
    return Schedule(
        num_rollout=job.plan.num_rollouts,
        save_interval=config.checkpoint.save_interval,
        eval_interval=config.eval.eval_interval,
        eval_before_train=not config.eval.skip_eval_before_train,
        sample_records_per_step=config.record.sample_records_per_step,
        save_optimizer=not config.checkpoint.no_save_optim,
        save_beside=config.checkpoint.async_save,
        capsule_interval=config.debug.capsule_interval,
        ref_update_interval=config.algorithm.ref_update_interval,
        update_weights_interval=config.weight_sync.update_weights_interval,
    )
