"""How the weights of a trainer in this process reach SGLang servers: what its run file names, built."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from miles.arch import ArchSpec
from miles.arch.precision import PrecisionPolicy
from miles.orchestration import assemble
from miles.orchestration.broadcast_weights import BroadcastWeights
from miles.orchestration.disk_weights import DiskWeights
from miles.orchestration.engine_pool import EnginePool
from miles.orchestration.sglang_servers import TensorPacket
from miles.orchestration.train_worker import TrainWorker
from miles.orchestration.weight_group import BUCKET_S
from miles.orchestration.weight_packets import pack
from miles.orchestration.weight_sender import WeightSender
from miles.orchestration.weight_sync import PacketWeights, ServedSync, weights_for_engine
from miles.record import RecordWriter
from miles.rollout.sglang.weight_payload import Announced, Meeting, with_tied_head
from miles.training.native.process_group import LOOPBACK

if TYPE_CHECKING:
    from miles.orchestration.job import Job


class OwnWeights:
    """The trainer of this process as a source.

    Packets are copies: a server that is replaced while the trainer steps loads the version before.
    """

    def __init__(self, trainer: TrainWorker, policy: PrecisionPolicy | None) -> None:
        self._trainer, self._policy = trainer, policy

    async def weights(self, version: int) -> TensorPacket:
        named = weights_for_engine(self._trainer, self._policy)
        copies = ((name, tensor.detach().to("cpu", copy=True)) for name, tensor in named)
        return TensorPacket(*pack(copies, version))


class OwnBroadcast:
    """The trainer of this process as the source of a broadcast (`broadcast_weights.BroadcastSource`)."""

    def __init__(self, trainer: TrainWorker, sender: WeightSender) -> None:
        self._trainer, self._sender = trainer, sender

    @property
    def still(self) -> asyncio.Lock:
        return self._trainer.still

    @property
    def learnt(self) -> int:
        return self._trainer.learnt

    @learnt.setter
    def learnt(self, learnt: int) -> None:
        self._trainer.learnt = learnt

    async def node(self) -> str:
        return LOOPBACK

    async def open_group(self, host: str, size: int) -> Meeting:
        return self._sender.open(host, size)

    async def join_group(self) -> None:
        await self._sender.join()

    async def next_bucket(self) -> Announced:
        return await self._sender.next_bucket()

    async def send_bucket(self, version: int) -> None:
        await self._sender.send_bucket(version)

    async def drop_group(self) -> None:
        await self._sender.drop()


def local_sync(
    job: Job, spec: ArchSpec, trainer: TrainWorker, pool: EnginePool, record: RecordWriter
) -> ServedSync:
    """How the weights of a trainer in this process are handed over: as the run file says, else over HTTP."""
    mode = job.resolved.config.weight_sync.update_weight_transfer_mode
    if mode == "broadcast":
        ranks = assemble.sglang_settings(job.resolved.config, job.plan).tensor_parallel_size
        return BroadcastWeights(OwnBroadcast(trainer, weight_sender(job, trainer)), pool, ranks, record)
    source = disk_weights(job, spec, trainer) if mode == "disk" else OwnWeights(trainer, _format(job))
    return PacketWeights(source, pool, record)


def weight_sender(job: Job, trainer: TrainWorker) -> WeightSender:
    """The end of a broadcast that is in the trainer's process, on its first rank."""
    sync, policy = job.resolved.config.weight_sync, _format(job)

    def weights() -> Iterable[tuple[str, Tensor]]:
        named = weights_for_engine(trainer, policy)
        return with_tied_head(named) if trainer.trainer.spec.tie_word_embeddings else named

    return WeightSender(
        weights,
        sync.update_weight_buffer_size,
        job.plan.device,
        sync.update_weight_delta,
        timeout_s=min(BUCKET_S, 30.0 * job.resolved.config.cluster.distributed_timeout_minutes),
    )


def disk_weights(job: Job, spec: ArchSpec, trainer: TrainWorker) -> DiskWeights:
    """Weights that travel as a checkpoint."""
    shared = job.resolved.config.weight_sync.update_weight_disk_dir
    directory = (Path(shared) if shared else job.run_dir).resolve() / "weights"
    directory.mkdir(parents=True, exist_ok=True)
    policy, source = _format(job), job.source
    delta = job.resolved.config.weight_sync.update_weight_delta and source.has_weights
    return DiskWeights(
        lambda: weights_for_engine(trainer, policy),
        spec,
        source.directory,
        directory,
        base=source.directory if delta else None,
    )


def _format(job: Job) -> PrecisionPolicy | None:
    return assemble.engine_precision(job.plan)
