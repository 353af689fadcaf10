"""The SGLang servers of one attempt in this process's care: a pool of them, and the way weights reach it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from miles.arch import ArchSpec
from miles.http_client import HttpClient
from miles.orchestration import assemble
from miles.orchestration.engine_pool import EnginePool
from miles.orchestration.local_weights import local_sync
from miles.orchestration.observer import Observer
from miles.orchestration.seats import Seat, ended_unless_ready
from miles.orchestration.sglang_servers import ServedEngine, TensorPacket
from miles.orchestration.train_worker import TrainWorker
from miles.orchestration.weight_packets import pack
from miles.orchestration.weight_sync import ServedSync
from miles.planning.speculation import OWN_DRAFT
from miles.record import RecordWriter, RunLayout
from miles.rollout.sglang.command import ServerOptions
from miles.rollout.sglang.engine import SglangEngine
from miles.rollout.sglang.server import ServerProcess

if TYPE_CHECKING:
    from miles.orchestration.job import Job


class SglangCrew:
    """Servers by seat: `engine-0`, `engine-1`, … Each prints into `logs/engine-N.log` of the run."""

    def __init__(self, job: Job, spec: ArchSpec, record: RecordWriter, observer: Observer) -> None:
        self._job, self._spec, self._record, self._observer = job, spec, record, observer
        self._config = job.resolved.config
        self._servers: list[ServedEngine] = []
        self._sync: ServedSync | None = None
        addresses = self._config.rollout.rollout_external_engine_addrs
        self._addresses: tuple[str | None, ...] = addresses or (None,) * self._config.engine.num_engines
        self.seats = [self._seat(rank, address) for rank, address in enumerate(self._addresses)]
        self.pool = EnginePool(self.seats)

    @asynccontextmanager
    async def serving(self, trainer: TrainWorker) -> AsyncIterator[EnginePool]:
        """Servers that answer, and take the weights of `trainer`; they end with the context."""
        self._sync = local_sync(self._job, self._spec, trainer, self.pool, self._record)
        try:
            with self._record.phase("start_servers"):
                await asyncio.gather(*(seat.fill() for seat in self.seats))
            yield self.pool
        finally:
            for seat in self.seats:
                seat.dismiss()
            # Those that are being started, too.
            for server in self._servers:
                server.kill()
            await asyncio.gather(*(server.leave() for server in self._servers))

    @property
    def sync(self) -> ServedSync:
        """How weights reach the servers; there is one while they serve."""
        assert self._sync is not None, "servers that serve have a source of weights"
        return self._sync

    async def receive_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Give every server weights that are not the trainer's."""
        await self.pool.receive(TensorPacket(*pack(weights, version)))

    def _seat(self, rank: int, address: str | None) -> Seat[Any]:
        name = f"engine-{rank}"
        limit = self._config.fault_tolerance.max_worker_restarts
        return Seat(name, lambda: self._launch(name, rank, address), limit, self._report)

    async def _launch(self, name: str, rank: int, address: str | None) -> ServedEngine:
        """A server that answers, with the current weights once there are any."""
        server = make_server(self._job, self._spec, name, rank, address)
        self._servers.append(server)
        if server.process is not None:
            self._record.event("worker_start", worker=name, pid=server.process.pid)
        with ended_unless_ready(server):
            await server.ready()
            if self._sync is not None:
                await self._sync.catch_up(server)
        return server

    def _report(self, kind: str, **fields: Any) -> None:
        """A server was lost or replaced."""
        self._record.event(kind, **fields)
        self._observer.on_event(kind, fields)


@dataclass(frozen=True)
class SharedGpus:
    """Numbers of the GPUs that a server shares with a trainer, and what it is told beside its plan."""

    numbers: tuple[str, ...] = ()
    args: Mapping[str, Any] = field(default_factory=dict)


OWN_GPUS = SharedGpus()
"""Those that the process sees."""


def make_server(
    job: Job, spec: ArchSpec, name: str, rank: int, address: str | None, gpus: SharedGpus = OWN_GPUS
) -> ServedEngine:
    """The client of the server at `address`, or of one that is started here; it may not answer yet."""
    process = None if address is not None else start_server(job, name, rank, gpus)
    http = HttpClient(address if process is None else process.url)  # type: ignore[arg-type]
    engine = SglangEngine(http, spec, assemble.sglang_settings(job.resolved.config, job.plan))
    config = job.resolved.config
    return ServedEngine(
        name,
        engine,
        process,
        speculative=config.sglang.speculative_algorithm is not None,
        delta=config.weight_sync.update_weight_delta,
        stop=config.rollout.rollout_stop,
    )


def start_server(job: Job, name: str, rank: int, gpus: SharedGpus) -> ServerProcess:
    """A server of this run, or its part on this node; it prints into a log of its own."""
    plan = job.plan
    assert plan.server_python is not None and plan.server_args is not None, "preflight asks for a server"
    checkpoint = str(job.source.directory)
    args = {"model_path": checkpoint, **plan.server_args}
    if args.get("speculative_algorithm") in OWN_DRAFT:
        # SGLang finds the MTP layers of some families by itself, and those of Qwen 3 only when told.
        args.setdefault("speculative_draft_model_path", checkpoint)
    args["random_seed"] = plan.server_args["random_seed"] + rank
    # The longest request has two positions to spare, also where it fills those of the model.
    longer = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    seen = {"CUDA_VISIBLE_DEVICES": ",".join(gpus.numbers)} if gpus.numbers else {}
    return ServerProcess(
        ServerOptions(
            python=Path(plan.server_python),
            args=args,
            log=RunLayout(job.run_dir).logs_dir / f"{name}.log",
            on_cpu=plan.device == "cpu",
            environment=dict(plan.exports) | longer | seen,
        )
    )
