"""The inline executor: trainer, engine and driver take turns in one process and share one set of weights."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from miles.arch import ArchSpec
from miles.orchestration import assemble, engine_faults, workers
from miles.orchestration.driver import Driver
from miles.orchestration.engine_faults import Receiver
from miles.orchestration.engine_gauges import GaugedWeights
from miles.orchestration.engine_pool import EnginePool
from miles.orchestration.observer import Observer
from miles.orchestration.rewarding import inline_score
from miles.orchestration.run_model import run_model
from miles.orchestration.sglang_crew import SglangCrew
from miles.orchestration.supervisor import Supervisor
from miles.orchestration.train_worker import TrainWorker
from miles.orchestration.watch import health_watch
from miles.orchestration.weight_sync import (
    EqualWeights,
    RoundedWeights,
    SharedWeights,
    WeightSync,
    weights_for_engine,
)
from miles.record import RecordWriter
from miles.rollout.engine import GenerationClient

if TYPE_CHECKING:
    from miles.orchestration.job import Job


class InlineExecutor:
    """One process."""

    @asynccontextmanager
    async def driver(
        self, job: Job, record: RecordWriter, supervisor: Supervisor, observer: Observer
    ) -> AsyncIterator[Driver]:
        """Load the model once, and put trainer, engine and the run's books around it."""
        workers.settle_process(job.plan.threads.count)
        spec = run_model(job.resolved.config, job.source)
        tokenizer = assemble.load_tokenizer(job.resolved.config, job.source.directory)
        trainer = workers.build_trainer(job, spec)
        if workers.is_supervised(job):
            demonstrations = workers.build_demonstrations(job, spec, tokenizer)
            yield await workers.build_driver(job, demonstrations, trainer, None, record, supervisor, observer)
            return
        async with _engine(job, spec, trainer, record, observer) as (client, weights, receiver):
            reward = job.resolved.config.reward
            score = inline_score(job.resolved.config, reward.reward_key, record)
            eval_key = reward.eval_reward_key or reward.reward_key
            eval_score = inline_score(job.resolved.config, eval_key, record)
            sampling = workers.build_sampling(job, spec, tokenizer, client, score, eval_score)
            fault, own = job.resolved.config.debug.inject_fault, assemble.engine_precision(job.plan)
            rollout, sync = engine_faults.inject(
                fault, sampling, weights, receiver, lambda: weights_for_engine(trainer, own)
            )
            driver = await workers.build_driver(job, rollout, trainer, sync, record, supervisor, observer)
            if isinstance(client, EnginePool):
                driver.watch = health_watch(client, job.resolved.config.fault_tolerance)
            yield driver

    def close(self) -> None:
        """Whatever an attempt started ended with it."""


@asynccontextmanager
async def _engine(
    job: Job, spec: ArchSpec, trainer: TrainWorker, record: RecordWriter, observer: Observer
) -> AsyncIterator[tuple[GenerationClient, WeightSync, Receiver]]:
    """What samples, how weights get there, and what takes weights that are not the trainer's."""
    own = assemble.engine_precision(job.plan)
    if job.plan.engine == "sglang":
        crew = SglangCrew(job, spec, record, observer)
        async with crew.serving(trainer):
            equal = job.resolved.config.debug.check_weight_update_equal
            sync: WeightSync = GaugedWeights(crew.sync, crew.pool, record)
            yield crew.pool, EqualWeights(sync, crew.pool.checksums, record) if equal else sync, crew
        return
    engine = workers.build_engine(job, spec)
    workers.watch_gap(job, trainer.trainer, engine)
    # Shared tensors are the newest at every step.
    every_step = job.resolved.config.weight_sync.update_weights_interval == 1
    shares = own is None and job.plan.trainer == "native" and every_step
    yield (
        engine,
        SharedWeights(trainer, engine) if shares else RoundedWeights(trainer, engine, own),
        engine,
    )
