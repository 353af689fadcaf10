"""SGLang servers as workers of a run: started or attached to, and given the current weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from miles.errors import MilesError
from miles.http_client import ConnectionLost
from miles.orchestration.weight_group import BUCKET_S
from miles.orchestration.weight_packets import Manifest, Weights, unpack, verify
from miles.orchestration.worker_loss import WorkerLost
from miles.rollout.engine import EngineHealth, GenerateRequest
from miles.rollout.sglang.control import CONTROL_S, MemoryTag, UpdateFailed
from miles.rollout.sglang.engine import SglangEngine
from miles.rollout.sglang.probe import probe
from miles.rollout.sglang.server import ServerProcess
from miles.rollout.sglang.weight_payload import Announced, Meeting
from miles.training.native.process_group import LOOPBACK

if TYPE_CHECKING:
    from miles.orchestration.engine_pool import Answer

WEIGHT_BYTES = "weight_bytes_sent"
"""Gauge of our own: bytes of the last update of the weights."""

START_S = 1800.0
"""Seconds a server has until it answers: a large checkpoint takes minutes to read."""

ATTACH_S = 120.0
"""Seconds that a server which others started may be away: whoever runs it restarts it."""

T = TypeVar("T")


@dataclass(frozen=True)
class TensorPacket:
    """Weights of one version in this process's memory, with the checksum of each."""

    manifest: Manifest
    weights: Weights

    @cached_property
    def digests(self) -> dict[str, bytes]:
        """128 bits over the bytes of every tensor: what is equal need not travel again."""
        return {
            name: blake2b(
                np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, digest_size=16
            ).digest()
            for name, (_, array) in self.weights.items()
        }


@dataclass(frozen=True)
class DiskPacket:
    """Weights of one version as a checkpoint that every server can read."""

    directory: Path
    version: int


class ServedEngine:
    """One server behind `engine_pool.RemoteEngine`: losses of it as WorkerLost, weights checked and loaded.

    `process`: the server, where this process started it. `delta`: what it was given last does not travel
    again. `stop`: the stop strings that it has to take.
    """

    def __init__(
        self,
        name: str,
        engine: SglangEngine,
        process: ServerProcess | None,
        speculative: bool = False,
        delta: bool = False,
        stop: tuple[str, ...] = (),
    ) -> None:
        self.name, self.engine, self.process = name, engine, process
        self._speculative, self._stop = speculative, stop
        self._meeting: Meeting | None = None
        """Of the group that it is in."""
        self._delta = delta
        self._given: dict[str, bytes] = {}
        """What it holds, under `delta`; nothing is known of it before its first weights, and after a loss."""
        self._probed = False

    async def node(self) -> str:
        """The address of its machine: preflight refuses servers elsewhere."""
        return LOOPBACK

    async def ready(self) -> None:
        """Return when it answers. Raises: Unavailable when our server does not start, else WorkerLost."""
        if self.process is not None:
            await self.process.wait_ready(START_S)
            return
        deadline = time.monotonic() + ATTACH_S
        while True:
            try:
                await self._asked(self.engine.check())
                return
            except WorkerLost:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(1.0)

    async def generate(self, calls: Sequence[Sequence[GenerateRequest]]) -> AsyncIterator[tuple[int, Answer]]:
        """Answer calls as they complete; they are sent together, so that the server batches them."""
        tasks = [asyncio.create_task(self._answer(i, requests)) for i, requests in enumerate(calls)]
        try:
            for completed in asyncio.as_completed(tasks):
                yield await completed
        finally:
            for task in tasks:
                task.cancel()

    async def _answer(self, index: int, requests: Sequence[GenerateRequest]) -> tuple[int, Answer]:
        try:
            return index, await self._asked(self.engine.generate(requests))
        except WorkerLost:
            raise
        except MilesError as refused:
            return index, refused

    async def abort(self, groups: Collection[int] | None) -> int:
        return await self._asked(self.engine.abort(groups))

    async def load(self, packet: TensorPacket | DiskPacket) -> None:
        """Check the packet, hand it over, and prove before the first request what the server can do.

        Raises: WeightsDamaged, before anything is sent; Unavailable when the proof fails.
        """
        if isinstance(packet, DiskPacket):
            version = packet.version
            await self._asked(self.engine.receive_checkpoint(packet.directory, version))
        else:
            version = packet.manifest.version
            verify(packet.manifest, packet.weights)
            await self._asked(self._receive(packet))
        await self._prove(version)

    async def _prove(self, version: int) -> None:
        """What the server can do, before the first request."""
        if not self._probed:
            await self._asked(probe(self.engine, version, self._speculative, self._stop))
            self._probed = True

    async def _receive(self, packet: TensorPacket) -> None:
        given, self._given = self._given, {}
        changed = packet.weights
        if self._delta:
            changed = {
                name: packet.weights[name] for name, d in packet.digests.items() if given.get(name) != d
            }
        await self.engine.receive_weights(unpack(changed), packet.manifest.version)
        if self._delta:
            self._given = packet.digests

    async def join_group(self, meeting: Meeting, rank: int) -> None:
        """Join the trainer's process group, from this rank on. Raises: WorkerLost, UpdateFailed."""
        self._meeting = meeting
        await self._partly(self.engine.join_broadcast(meeting, rank))

    async def begin_broadcast(self, version: int) -> None:
        await self._partly(self.engine.begin_broadcast(version))

    async def take_broadcast(self, announced: Announced, version: int) -> None:
        """Load one bucket that the group brings.

        Raises: UpdateFailed, having left the group, where the server goes on; WorkerLost where it is gone.
        """
        assert self._meeting is not None, "a server joins a group before anything is broadcast"
        name = self._meeting.name
        try:
            # The trainer's end gives up first, and says why.
            limit = BUCKET_S + CONTROL_S
            await self._partly(self.engine.take_broadcast(name, announced, version, limit))
        except UpdateFailed:
            with suppress(MilesError):
                await self.leave_group()
            raise

    async def end_broadcast(self, version: int) -> None:
        """Go on with what arrived, and prove before the first request what the server can do."""
        await self._partly(self.engine.end_broadcast(version))
        await self._prove(version)

    async def leave_group(self) -> None:
        """Leave the group, if it is in one: whoever waits for this server there is told."""
        meeting, self._meeting = self._meeting, None
        if meeting is not None:
            await self._asked(self.engine.leave_broadcast(meeting.name))

    async def _partly(self, request: Awaitable[T]) -> T:
        """A part of a broadcast: what fails on a server that is still there is no loss of it."""
        try:
            return await request
        except UpdateFailed as failed:
            if not isinstance(failed.__cause__, ConnectionLost):
                raise
            raise self._loss(failed) from failed
        except ConnectionLost as gone:
            raise self._loss(gone) from gone

    async def shared(self, call: Callable[[SglangEngine], Awaitable[T]]) -> T:
        """A call between two turns on the same GPUs. Raises: WorkerLost."""
        return await self._asked(call(self.engine))

    async def reclaim(self, tags: Sequence[MemoryTag]) -> None:
        """Take memory back; the first time that it could answer, prove what it can do. Raises: WorkerLost."""
        await self.shared(lambda engine: engine.reclaim(tags))
        version = self.engine.health().weight_version
        if "kv_cache" in tags and version is not None:
            await self._prove(version)

    async def health(self) -> EngineHealth:
        return await self._asked(self.engine.check())

    async def metrics(self) -> dict[str, float]:
        (gauges,) = await self._asked(self.engine.measurements())
        return gauges | {WEIGHT_BYTES: float(self.engine.sent_bytes)}

    async def checksum(self) -> str:
        """One number over the weights that the server holds."""
        return await self._asked(self.engine.control.checksum())

    async def leave(self) -> None:
        """Let go of a server that others started; it goes on."""
        if self.process is None:
            with suppress(MilesError):
                await self.leave_group()

    def kill(self) -> None:
        self.engine.retire()
        if self.process is not None:
            self.process.kill()

    async def _asked(self, request: Awaitable[T]) -> T:
        """The answer; a server that is gone, or whose weights are half new, is lost."""
        try:
            return await request
        except (ConnectionLost, UpdateFailed) as gone:
            raise self._loss(gone) from gone

    def _loss(self, gone: MilesError) -> WorkerLost:
        ended = self.process.ended if self.process is not None else None
        return WorkerLost(self.name, ended or f"{gone.what}: {gone.why}")
