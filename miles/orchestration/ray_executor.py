"""The ray executor: trainer, engines and reward workers in processes of their own, the loop in this one."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from miles.data.sample import Sample
from miles.orchestration import assemble, workers
from miles.orchestration.broadcast_weights import BroadcastWeights
from miles.orchestration.driver import Driver
from miles.orchestration.engine_gauges import GaugedWeights
from miles.orchestration.engine_pool import EnginePool, RemoteEngine
from miles.orchestration.handle_weights import HandleWeights
from miles.orchestration.job import Job
from miles.orchestration.observer import Observer
from miles.orchestration.posts import Post
from miles.orchestration.ray_actors import ACTORS
from miles.orchestration.ray_runtime import RayRuntime
from miles.orchestration.rewarding import record_failures
from miles.orchestration.run_model import run_model
from miles.orchestration.seats import Seat, call, ended_unless_ready
from miles.orchestration.supervisor import Supervisor
from miles.orchestration.trainer_ranks import TrainerRanks, WrittenWeights
from miles.orchestration.turns import SharedGpus
from miles.orchestration.watch import health_watch
from miles.orchestration.weight_sync import EqualWeights, PacketWeights, ServedSync, WeightSync
from miles.orchestration.worker_loss import WorkerLost
from miles.planning.workers import WorkersPlan
from miles.record import RecordWriter, events
from miles.rollout.collect import Score

if TYPE_CHECKING:
    from miles.orchestration.ray_handles import RayServer
    from miles.orchestration.ray_nodes import NodeBook
    from miles.orchestration.ray_shared_gpus import Placed

H = TypeVar("H")
EMPTY: Mapping[str, Any] = {}


class RayExecutor:
    """Real Ray actors, in a private runtime or in the cluster that runs this process."""

    def __init__(self, in_cluster: bool) -> None:
        self._runtime = RayRuntime(in_cluster)
        self._nodes: NodeBook | None = None

    @asynccontextmanager
    async def driver(
        self, job: Job, record: RecordWriter, supervisor: Supervisor, observer: Observer
    ) -> AsyncIterator[Driver]:
        """Start the workers of an attempt, and put the run's books around them."""
        if not self._runtime.started:
            with record.phase("start_ray"):
                self._runtime.start(job.plan, partial(_tell, record, observer))
            supervisor.listen_again()
        if self._nodes is None:
            from miles.orchestration.ray_nodes import NodeBook

            self._nodes = NodeBook()
        crew = _Crew(self._runtime, self._nodes, job, record, observer)
        try:
            with record.phase("start_workers"):
                driver = await crew.assemble(supervisor)
            yield driver
        except WorkerLost as lost:
            crew.tell_lost_node(lost.worker)
            raise
        finally:
            crew.dismiss()

    def close(self) -> None:
        """End the private runtime; in a cluster, give the reserved room back."""
        self._runtime.stop()


class _Crew:
    """The workers of one attempt."""

    def __init__(
        self, runtime: RayRuntime, nodes: NodeBook, job: Job, record: RecordWriter, observer: Observer
    ) -> None:
        assert job.plan.workers is not None, "the ray executor has a plan of its workers"
        self._nodes = nodes
        self._runtime, self._job, self._record, self._observer = runtime, job, record, observer
        self._plan: WorkersPlan = job.plan.workers
        self._config = job.resolved.config
        self._workers: list[Any] = []
        self._seats: list[Seat[Any]] = []
        self._sync: ServedSync | None = None

    async def assemble(self, supervisor: Supervisor) -> Driver:
        """Every worker, and the driver around them."""
        job, record, observer = self._job, self._record, self._observer
        spec = run_model(self._config, job.source)
        tokenizer = assemble.load_tokenizer(self._config, job.source.directory)
        if workers.is_supervised(job):
            trainer = await self._trainer()
            demonstrations = workers.build_demonstrations(job, spec, tokenizer)
            return await workers.build_driver(
                job, demonstrations, trainer, None, record, supervisor, observer
            )
        judges = self._reward_seats()
        shared: SharedGpus | None = None
        sync: WeightSync
        if self._plan.shares_gpus:
            await asyncio.gather(*(seat.fill() for seat in judges))
            trainer, engines, shared, sync = await self._on_shared_gpus()
            pool = EnginePool(engines)
        else:
            engines = self._engine_seats()
            others = asyncio.gather(*(seat.fill() for seat in (*engines, *judges)))
            trainer, _ = await asyncio.gather(self._trainer(), others)
            pool = EnginePool(engines)
            sync = self._sync = self._way_of_weights(trainer, pool)
        turns = itertools.cycle(judges)
        rollout = workers.build_sampling(
            job, spec, tokenizer, pool, self._score(turns, False), self._score(turns, True)
        )
        served = job.plan.engine == "sglang"
        sync = GaugedWeights(sync, pool, record) if served else sync
        if self._config.debug.check_weight_update_equal:
            sync = EqualWeights(sync, pool.checksums, record)
        driver = await workers.build_driver(job, rollout, trainer, sync, record, supervisor, observer, shared)
        driver.watch = health_watch(pool, self._config.fault_tolerance)
        return driver

    def _way_of_weights(self, trainer: TrainerRanks, pool: EnginePool) -> ServedSync:
        mode = self._config.weight_sync.update_weight_transfer_mode
        if mode != "broadcast":
            source = WrittenWeights(trainer) if mode == "disk" else trainer
            return PacketWeights(source, pool, self._record)
        ranks = assemble.sglang_settings(self._config, self._job.plan).tensor_parallel_size
        return BroadcastWeights(trainer, pool, ranks, self._record)

    def dismiss(self) -> None:
        """End every process of the attempt."""
        for seat in self._seats:
            seat.dismiss()
        for worker in self._workers:
            worker.kill()

    async def _trainer(self) -> TrainerRanks:
        from miles.orchestration.ray_handles import RayTrainer

        started = (self._start("trainer", i, bundle=i, handle=RayTrainer) for i in range(self._plan.trainers))
        trainer = TrainerRanks(await asyncio.gather(*started))
        await trainer.join()
        return trainer

    async def _on_shared_gpus(
        self,
    ) -> tuple[TrainerRanks, Sequence[Seat[RemoteEngine]], SharedGpus, WeightSync]:
        """Servers first, which then give everything back, and the trainer after them on the same GPUs.

        A server that is lost is not replaced, for the trainer may have its memory: the run ends.
        """
        from miles.orchestration.ray_handles import RayTrainer
        from miles.orchestration.ray_shared_gpus import Placed, in_rank_order

        cluster, each = self._config.cluster, self._plan.gpus_per_engine
        started = (self._start("trainer", i, bundle=i, handle=RayTrainer) for i in range(self._plan.trainers))
        found = await asyncio.gather(*started)
        nodes = await asyncio.gather(*(rank.node() for rank in found))
        gpus = await asyncio.gather(*(rank.gpu() for rank in found))
        ranks = in_rank_order(
            [Placed(*row) for row in zip(found, nodes, gpus, range(len(found)), strict=True)]
        )
        groups = [ranks[i : i + each] for i in range(0, self._plan.engines * each, each)]
        servers = await asyncio.gather(*(self._shared_server(i, group) for i, group in enumerate(groups)))
        seats = [_seated(server, self._report) for server in servers]
        await asyncio.gather(*(seat.fill() for seat in seats))
        trainer = TrainerRanks([rank.trainer for rank in ranks])
        moves_engines = _moves(cluster.offload_rollout, cluster.offload, cluster.colocate)
        moves_trainer = _moves(cluster.offload_train, cluster.offload, cluster.colocate)
        turns = SharedGpus(trainer, servers, moves_trainer, moves_engines)
        await turns.make_room()
        await trainer.join()
        return trainer, seats, turns, HandleWeights(trainer, servers, each)

    async def _shared_server(self, rank: int, ranks: Sequence[Placed]) -> RayServer:
        """A server on the GPUs of these ranks, on one node or over several."""
        from miles.orchestration.ray_handles import Handle, RayServer
        from miles.orchestration.ray_shared_gpus import server_parts

        head, *others = server_parts(ranks, await ranks[0].trainer.free_port())
        further = (
            self._start("part", rank, part.bundle, Handle, part.gpus, part.args, suffix=f"-{number}")
            for number, part in enumerate(others, 1)
        )
        # The first part answers once all of them have met.
        server, *_ = await asyncio.gather(
            self._start("engine", rank, head.bundle, RayServer, head.gpus, head.args), *further
        )
        answering: RayServer = server
        return answering

    def _engine_seats(self) -> Sequence[Seat[RemoteEngine]]:
        from miles.orchestration.ray_handles import RayEngine, RayServer

        handle = RayServer if self._job.plan.engine == "sglang" else RayEngine

        async def launch(rank: int) -> RemoteEngine:
            engine: RemoteEngine = await self._start("engine", rank, self._plan.trainers + rank, handle)
            if self._sync is not None:
                with ended_unless_ready(engine):
                    await self._sync.catch_up(engine)
            return engine

        return [self._seat(f"engine-{rank}", launch, rank) for rank in range(self._plan.engines)]

    def _reward_seats(self) -> Sequence[Seat[Any]]:
        from miles.orchestration.ray_handles import RayReward

        first = self._plan.first_judge

        async def launch(rank: int) -> Any:
            return await self._start("reward", rank, first + rank, RayReward)

        return [self._seat(f"reward-{rank}", launch, rank) for rank in range(self._plan.reward_workers)]

    def _seat(self, name: str, launch: Any, rank: int) -> Seat[Any]:
        limit = self._config.fault_tolerance.max_worker_restarts
        seat: Seat[Any] = Seat(name, lambda: launch(rank), limit, self._report)
        self._seats.append(seat)
        return seat

    async def _start(
        self,
        role: str,
        rank: int,
        bundle: int,
        handle: Any,
        gpus: tuple[str, ...] = (),
        server_args: Mapping[str, Any] = EMPTY,
        suffix: str = "",
    ) -> Any:
        """Start one worker process and wait until it is ready.

        `gpus`: those that it shares with a trainer; `server_args`: of a part of a larger server.
        """
        import ray

        from miles.orchestration.ray_handles import answer
        from miles.orchestration.ray_nodes import within

        name = f"{role}{suffix}-{rank}"
        cpus = 1 if role == "reward" else self._plan.threads
        options = {
            "num_cpus": cpus,
            "num_gpus": 0 if gpus else self._gpus_of(role),
            "max_restarts": 0,
            "scheduling_strategy": self._runtime.place(bundle),
            "runtime_env": {"env_vars": dict(self._job.plan.exports)},
        }
        await self._nodes.settle()
        kind = "server" if role == "engine" and self._job.plan.engine == "sglang" else role
        post = Post(name, self._job, os.getcwd(), gpus, dict(server_args))
        actor = ray.remote(ACTORS[kind]).options(**options).remote(post)
        limit = self._config.fault_tolerance.worker_start_timeout
        with ended_unless_ready(handle(name, actor, 0)):
            pid, node = await within(limit, name, answer(name, actor.ready.remote()))
        self._nodes.moved_in(name, node)
        worker = handle(name, actor, pid)
        self._workers.append(worker)
        return worker

    def _gpus_of(self, role: str) -> int:
        each = self._plan.gpus_per_engine
        return {"trainer": min(each, 1), "engine": each}.get(role, 0)

    def _score(self, turns: itertools.cycle[Seat[Any]], evaluation: bool) -> Score:
        async def score(samples: Sequence[Sample]) -> list[Any]:
            judged, failures = await call(next(turns), lambda judge: judge.score(samples, evaluation))
            record_failures(self._record, failures)
            for sample, copy in zip(samples, judged, strict=True):
                sample.metadata, sample.status = copy.metadata, copy.status
            return [copy.reward for copy in judged]

        return score

    def _report(self, kind: str, **fields: Any) -> None:
        """A worker was lost or replaced; where its whole node went, that is told first."""
        if kind == events.WORKER_DEAD:
            self.tell_lost_node(fields["worker"])
        _tell(self._record, self._observer, kind, **fields)

    def tell_lost_node(self, worker: str) -> None:
        """Say so where a worker went with its whole machine."""
        gone = self._nodes.lost_with(worker)
        if gone is not None:
            told: dict[str, Any] = {"address": gone.address, "workers": list(gone.workers)}
            _tell(self._record, self._observer, events.NODE_LOST, **told)


def _tell(record: RecordWriter, observer: Observer, kind: str, **fields: Any) -> None:
    record.event(kind, **fields)
    observer.on_event(kind, fields)


def _moves(side: bool | None, both: bool, colocated: bool) -> bool:
    """Whether a side gives its memory back between turns: as set, else where it shares GPUs."""
    return (both or colocated) if side is None else side


def _seated(server: RayServer, report: Any) -> Seat[RemoteEngine]:
    """The seat of a server that is not replaced."""

    async def given() -> RemoteEngine:
        return server

    return Seat(server.name, given, 0, report)
