"""What runs inside the worker processes: the same trainer and engine as everywhere, around a seat.

The classes are plain; `ray_handles` makes actors of them. Each process has one event loop, one log and one
record file of its own. `reward_actor` is apart: judging needs no torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles.data.sample import Sample
from miles.errors import MilesError
from miles.orchestration import assemble, workers
from miles.orchestration.disk_weights import DiskWeights
from miles.orchestration.local_weights import disk_weights, weight_sender
from miles.orchestration.posts import Post, take_post, whereabouts
from miles.orchestration.reward_actor import RewardActor
from miles.orchestration.route_wire import pack_answer, unpack_samples
from miles.orchestration.run_model import run_model
from miles.orchestration.sglang_crew import SharedGpus, make_server, start_server
from miles.orchestration.sglang_servers import DiskPacket, TensorPacket
from miles.orchestration.turns import Held
from miles.orchestration.weight_packets import Manifest, Weights, pack, unpack, verify
from miles.orchestration.weight_sync import weights_for_engine
from miles.record import RecordWriter
from miles.rollout.engine import EngineHealth, GenerateRequest
from miles.rollout.sglang.control import MemoryTag
from miles.rollout.sglang.ipc_payload import encode_handles
from miles.rollout.sglang.server import free_ports
from miles.rollout.sglang.weight_payload import Announced, Bucket, Meeting, buckets, with_tied_head
from miles.training.megatron.trainer import MegatronTrainer
from miles.training.trainer import TrainResult

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from miles.orchestration.engine_pool import Answer
    from miles.training.native.process_group import DataParallel


def settled(post: Post) -> RecordWriter:
    """Make this process the named worker, and give it its share of the machine."""
    workers.settle_process(post.job.plan.threads.count)
    return take_post(post)


def _address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


class TrainerActor:
    """One trainer rank. It serves after `join`."""

    def __init__(self, post: Post) -> None:
        self._post, self._record = post, settled(post)
        self._store: TCPStore | None = None
        self._handles: Iterator[tuple[Bucket, bool]] | None = None
        self._lent: Bucket = []
        self._written: DiskWeights | None = None

    async def ready(self) -> tuple[int, str]:
        """The process id, and the id of its node."""
        return whereabouts()

    async def node(self) -> str:
        """The address of this process's machine."""
        return _address()

    async def open_store(self, host: str) -> int:
        """Listen for the other ranks on an address of this machine; the port. For the first rank."""
        from miles.training.native.process_group import open_store

        self._store = open_store(host)
        return int(self._store.port)

    async def join(self, rank: int, size: int, meeting: tuple[str, int] | None) -> None:
        """Join the other ranks at the first one's store, and load the weights the job starts from.

        `meeting`: address and port of that store; None for a trainer of one rank.
        """
        job = self._post.job
        with self._record.busy("load"):
            parallel = None if meeting is None else self._join_group(rank, size, *meeting)
            self._worker = workers.build_trainer(job, run_model(job.resolved.config, job.source), parallel)
            self._sender = weight_sender(job, self._worker)

    def _join_group(self, rank: int, size: int, host: str, port: int) -> DataParallel:
        from miles.training.native.process_group import connect_store, join

        store = self._store if self._store is not None else connect_store(host, port)
        cluster = self._post.job.resolved.config.cluster
        return join(
            store,
            rank,
            size,
            # Ray shows a worker its own GPU alone.
            "cuda:0" if self._post.job.plan.device == "cuda" else "cpu",
            timeout_s=60.0 * cluster.distributed_timeout_minutes,
            backend=cluster.distributed_backend,
        )

    async def train(self, samples: Sequence[Sample]) -> TrainResult:
        with self._record.busy("train"):
            return await self._worker.train(unpack_samples(samples))

    async def update_reference(self) -> None:
        with self._record.busy("update_reference"):
            await self._worker.update_reference()

    async def set_knobs(self, patch: Mapping[str, float]) -> None:
        await self._worker.set_knobs(patch)

    async def save(self, directory: Path, optimizer: bool) -> None:
        with self._record.busy("save"):
            await self._worker.save(directory, optimizer=optimizer)

    async def saved(self, wait: bool) -> bool:
        with self._record.busy("save"):
            return await self._worker.saved(wait=wait)

    async def load(self, directory: Path) -> None:
        with self._record.busy("load"):
            await self._worker.load(directory)

    async def weights(self, version: int) -> tuple[Manifest, Weights]:
        """The weights of this moment, in the engines' format; the caller keeps the second part in the object
        store.
        """
        job = self._post.job
        with self._record.busy("update_weights"):
            target = assemble.engine_precision(job.plan)
            return pack(weights_for_engine(self._worker, target), version)

    async def write_weights(self, version: int) -> DiskPacket:
        """The weights of this moment as a checkpoint that every server can read. For the first rank."""
        with self._record.busy("update_weights"):
            if self._written is None:
                spec = self._worker.trainer.spec
                self._written = disk_weights(self._post.job, spec, self._worker)
            return await self._written.weights(version)

    async def free_port(self) -> int:
        """A port of this machine that nobody has now."""
        return free_ports(1)[0]

    async def gpu(self) -> str:
        """The number of this process's GPU on its node; empty without one."""
        import ray

        ids = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        return str(ids[0]) if ids else ""

    async def hold(self, held: Held) -> None:
        with self._record.busy("offload"):
            trainer = self._worker.trainer
            assert isinstance(trainer, MegatronTrainer), "preflight: other trainers do not share GPUs"
            trainer.hold(held)

    async def next_handles(self, version: int) -> tuple[str, bool]:
        """The next bucket of the weights of this moment, on this rank's GPU, as handles; whether it is the
        last. It stays in memory until `drop_handles`. Collective.
        """
        job, config = self._post.job, self._post.job.resolved.config
        with self._record.busy("update_weights"):
            if self._handles is None:
                target = assemble.engine_precision(job.plan)
                weights = weights_for_engine(self._worker, target, everywhere=True)
                tied = self._worker.trainer.spec.tie_word_embeddings
                sent = with_tied_head(weights) if tied else weights
                self._handles = buckets(sent, config.weight_sync.update_weight_buffer_size)
            self._lent, last = next(self._handles)
            if last:
                self._handles = None
            return encode_handles(self._lent), last

    async def drop_handles(self) -> None:
        """Free the bucket that was lent."""
        import torch

        self._lent = []
        torch.cuda.ipc_collect()

    async def open_group(self, host: str, size: int) -> Meeting:
        """Listen for the servers of a broadcast on an address of this machine. For the first rank."""
        return self._sender.open(host, size)

    async def join_group(self) -> None:
        await self._sender.join()

    async def next_bucket(self) -> Announced:
        with self._record.busy("update_weights"):
            return await self._sender.next_bucket()

    async def gather_along(self) -> None:
        """Take part in the first rank's gather of all weights, and keep none. For the other ranks."""
        with self._record.busy("update_weights"):
            for _ in weights_for_engine(self._worker, assemble.engine_precision(self._post.job.plan)):
                pass

    async def send_bucket(self, version: int) -> None:
        await self._sender.send_bucket(version)

    async def drop_group(self) -> None:
        await self._sender.drop()


class EngineActor:
    """One engine."""

    def __init__(self, post: Post) -> None:
        self._record = settled(post)
        job = post.job
        self._engine = workers.build_engine(job, run_model(job.resolved.config, job.source))

    async def ready(self) -> tuple[int, str]:
        """The process id, and the id of its node."""
        return whereabouts()

    async def load(self, manifest: Manifest, weights: Weights) -> None:
        """Check all of the weights, then take them over between two steps. Raises: WeightsDamaged."""
        with self._record.busy("update_weights"):
            verify(manifest, weights)
            await self._engine.receive_weights(unpack(weights), manifest.version)

    async def generate(self, calls: Sequence[Sequence[GenerateRequest]]) -> AsyncIterator[tuple[int, Answer]]:
        """Answer calls as they complete; they are submitted together, so that they share steps."""
        with self._record.busy("generate"):
            tasks = [asyncio.create_task(self._answer(i, requests)) for i, requests in enumerate(calls)]
            for completed in asyncio.as_completed(tasks):
                yield await completed

    async def _answer(self, index: int, requests: Sequence[GenerateRequest]) -> tuple[int, Answer]:
        try:
            return index, pack_answer(await self._engine.generate(requests))
        except MilesError as refused:
            return index, refused

    async def abort(self, groups: Collection[int] | None) -> int:
        return await self._engine.abort(groups)

    async def health(self) -> EngineHealth:
        return self._engine.health()

    async def metrics(self) -> dict[str, float]:
        return self._engine.metrics()


class ServerActor:
    """One SGLang server, started on the node of this process or attached to; the methods of `EngineActor`."""

    def __init__(self, post: Post) -> None:
        self._record = settled(post)
        job, rank = post.job, int(post.name.rpartition("-")[2])
        addresses = job.resolved.config.rollout.rollout_external_engine_addrs
        spec = run_model(job.resolved.config, job.source)
        # The server prints into a file of its own, beside that of this process.
        address = addresses[rank] if addresses else None
        self._server = make_server(
            job, spec, f"server-{rank}", rank, address, SharedGpus(post.gpus, post.server_args)
        )

    async def ready(self) -> tuple[int, str]:
        """The process id and the id of its node, once the server answers."""
        await self._server.ready()
        return whereabouts()

    async def load(self, manifest: Manifest, weights: Weights) -> None:
        """Check all of the weights, then hand them over. Raises: WeightsDamaged, WorkerLost."""
        with self._record.busy("update_weights"):
            await self._server.load(TensorPacket(manifest, weights))

    async def load_checkpoint(self, packet: DiskPacket) -> None:
        """Let the server read its weights from a directory. Raises: WorkerLost."""
        with self._record.busy("update_weights"):
            await self._server.load(packet)

    async def generate(self, calls: Sequence[Sequence[GenerateRequest]]) -> AsyncIterator[tuple[int, Answer]]:
        """Answer calls as they complete; they are sent together. Raises: WorkerLost."""
        with self._record.busy("generate"):
            async for index, answer in self._server.generate(calls):
                yield index, pack_answer(answer)

    async def abort(self, groups: Collection[int] | None) -> int:
        return await self._server.abort(groups)

    async def health(self) -> EngineHealth:
        return await self._server.health()

    async def metrics(self) -> dict[str, float]:
        return await self._server.metrics()

    async def release(self, tags: Sequence[MemoryTag]) -> None:
        with self._record.busy("offload"):
            await self._server.shared(lambda engine: engine.release(tags))

    async def reclaim(self, tags: Sequence[MemoryTag]) -> None:
        with self._record.busy("offload"):
            await self._server.reclaim(tags)

    async def begin_handles(self, version: int) -> bool:
        return await self._server.shared(lambda engine: engine.begin_handles(version))

    async def take_handles(self, payloads: Sequence[str], version: int, last: bool) -> None:
        with self._record.busy("update_weights"):
            await self._server.shared(lambda engine: engine.take_handles(payloads, version, last))

    async def end_handles(self, version: int, in_session: bool) -> None:
        await self._server.shared(lambda engine: engine.end_handles(version, in_session))

    async def node(self) -> str:
        """The address of this process's machine, on which its server runs."""
        return _address()

    async def checksum(self) -> str:
        return await self._server.checksum()

    async def join_group(self, meeting: Meeting, rank: int) -> None:
        await self._server.join_group(meeting, rank)

    async def begin_broadcast(self, version: int) -> None:
        await self._server.begin_broadcast(version)

    async def take_broadcast(self, announced: Announced, version: int) -> None:
        with self._record.busy("update_weights"):
            await self._server.take_broadcast(announced, version)

    async def end_broadcast(self, version: int) -> None:
        await self._server.end_broadcast(version)

    async def leave_group(self) -> None:
        await self._server.leave_group()


class ServerPartActor:
    """The part of a server on one of its further nodes; the first one answers for all."""

    def __init__(self, post: Post) -> None:
        self._record = settled(post)
        rank = int(post.name.rpartition("-")[2])
        shared = SharedGpus(post.gpus, post.server_args)
        self._process = start_server(post.job, f"server-{post.name}", rank, shared)

    async def ready(self) -> tuple[int, str]:
        return whereabouts()


ACTORS: dict[str, type[Any]] = {
    "trainer": TrainerActor,
    "engine": EngineActor,
    "server": ServerActor,
    "part": ServerPartActor,
    "reward": RewardActor,
}
"""Worker classes by what they are; an engine and a server are both called engine-<rank>."""
