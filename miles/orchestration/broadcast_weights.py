"""Weights through one process group of the trainer and all of its servers: who does what, and when.

    the servers that lack the version stop decoding -> they meet in a group, if they are not in it -> bucket
    by bucket: the trainer says what comes, both sides meet in the broadcast, the next one is gathered
    meanwhile -> they go on.

A server that is lost in the middle, or where all meet, takes the broadcast with it, not the others: every
member leaves the group, the lost one is replaced, and a new group is given the version from its beginning. A
member that waits for the dead one is let go by the end of its neighbours' connections and of the trainer's
store; one that does not answer is lost, too.

A server that is replaced between two updates is given the trainer's weights by a group of its own, while the
trainer stands still, before it serves. Once the trainer has learnt these are newer than what the others hold,
and go by the number of the step that made them: the older ones are gone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from miles.errors import MilesError, RunError
from miles.orchestration.engine_pool import EnginePool, RemoteEngine
from miles.orchestration.worker_loss import WorkerLost
from miles.record import RecordWriter
from miles.rollout.sglang.control import UpdateFailed
from miles.rollout.sglang.weight_payload import Announced, Meeting
from miles.training.native.process_group import LOOPBACK

MAX_SENDS = 3
"""Broadcasts of one version that may break off with no server lost."""

GRACE_S = 10.0
"""Seconds that the members of a group have to answer once it has broken."""


class BroadcastSource(Protocol):
    """A trainer, in this process or in others. Every method may raise WorkerLost, UpdateFailed."""

    @property
    def still(self) -> asyncio.Lock:
        """Held while its weights must not change."""

    learnt: int
    """Steps that changed them since this was last set to 0."""

    async def node(self) -> str: ...

    async def open_group(self, host: str, size: int) -> Meeting: ...

    async def join_group(self) -> None: ...

    async def next_bucket(self) -> Announced: ...

    async def send_bucket(self, version: int) -> None: ...

    async def drop_group(self) -> None: ...


class BroadcastSink(RemoteEngine, Protocol):
    """One server. Every method may raise WorkerLost, or UpdateFailed where it is there and has no weights."""

    name: str

    async def node(self) -> str: ...

    async def join_group(self, meeting: Meeting, rank: int) -> None: ...

    async def begin_broadcast(self, version: int) -> None: ...

    async def take_broadcast(self, announced: Announced, version: int) -> None: ...

    async def end_broadcast(self, version: int) -> None: ...

    async def leave_group(self) -> None: ...


TRAINER, GATHER = "trainer", "gather"
Part = BroadcastSink | str
"""Who has a part in a broadcast: a server, or one of the trainer's two."""
Parts = Mapping[Part, Coroutine[Any, Any, None]]


class Broken(Exception):
    """A broadcast broke off. `lost`: servers that are gone."""

    def __init__(self, reason: str, lost: Mapping[BroadcastSink, WorkerLost]) -> None:
        super().__init__(reason)
        self.reason, self.lost = reason, lost


@dataclass
class Sent:
    """What a broadcast took: seconds in which buckets were gathered, and in which they were on their way.

    Together they are more than the broadcast's own seconds where one ran beside the other.
    """

    bytes: int = 0
    buckets: int = 0
    gather_seconds: float = 0.0
    send_seconds: float = 0.0

    async def gathering(self, part: Awaitable[None]) -> None:
        started = time.perf_counter()
        await part
        self.gather_seconds += time.perf_counter() - started

    async def sending(self, part: Awaitable[None]) -> None:
        started = time.perf_counter()
        await part
        self.send_seconds += time.perf_counter() - started


class BroadcastWeights:
    """Implements `weight_sync.ServedSync`. `ranks`: GPUs of one server."""

    def __init__(self, trainer: BroadcastSource, pool: EnginePool, ranks: int, record: RecordWriter) -> None:
        self._trainer, self._pool, self._ranks, self._record = trainer, pool, ranks, record
        self._version: int | None = None
        self._members: tuple[BroadcastSink, ...] = ()
        self._holders: tuple[BroadcastSink, ...] = ()
        """Servers that hold `_version`."""

    async def send(self, version: int) -> None:
        """Raises: RunError when a server is lost once too often, or the version cannot be handed over."""
        self._pool.forget_prompts()
        self._version, self._holders = version, ()
        self._trainer.learnt = 0
        sends = 0
        while lacking := [seat for seat in self._pool.seats if seat.worker not in self._holders]:
            asked = [(seat, seat.worker) for seat in lacking]
            try:
                async with self._trainer.still:
                    await self._give(version, [server for _, server in asked])
            except Broken as broken:
                sends += not broken.lost
                if sends == MAX_SENDS:
                    what = f"weight version {version} could not be handed over in {MAX_SENDS} attempts"
                    raise RunError(what, why=broken.reason) from broken
                # Nothing is held here: a server that is replaced is given its weights under the same lock.
                gone = ((seat, server) for seat, server in asked if server in broken.lost)
                await asyncio.gather(*(seat.replace(server, broken.lost[server]) for seat, server in gone))

    async def catch_up(self, server: BroadcastSink) -> None:
        """Give a server that was started in place of another the trainer's weights, once there was an
        update. Raises: WorkerLost.
        """
        async with self._trainer.still:
            if self._version is None:
                return
            try:
                await self._give(self._version + self._trainer.learnt, [server])
            except Broken as broken:
                raise broken.lost.get(server) or WorkerLost(server.name, broken.reason) from broken

    async def _give(self, version: int, servers: Sequence[BroadcastSink]) -> None:
        """Raises: Broken."""
        started = time.perf_counter()
        try:
            await self._parted(servers)
            # First, so that one which is gone already is missed before the others wait for it in a group.
            await self._all({server: server.begin_broadcast(version) for server in servers})
            await self._met(servers)
            size = await self._buckets(version, servers)
            await self._all({server: server.end_broadcast(version) for server in servers})
        except Broken as broken:
            self._members = ()
            await asyncio.gather(*(_leave(server) for server in servers if server not in broken.lost))
            lost = sorted(server.name for server in broken.lost)
            self._record.event("weight_sync_failed", version=version, reason=broken.reason, lost=lost)
            raise
        self._holders = (*self._holders, *servers)
        self._record.event(
            "weights_broadcast",
            version=version,
            engines=[server.name for server in servers],
            seconds=time.perf_counter() - started,
            **asdict(size),
        )

    async def _parted(self, servers: Sequence[BroadcastSink]) -> None:
        """No group but one of exactly these servers."""
        if self._members == tuple(servers):
            return
        left, self._members = self._members, ()
        serving = {seat.worker for seat in self._pool.seats}
        leaving = (_leave(server) for server in left if server in serving)
        await asyncio.gather(self._trainer.drop_group(), *leaving)

    async def _met(self, servers: Sequence[BroadcastSink]) -> None:
        """A group of exactly these servers: the one there is, or a new one."""
        if self._members == tuple(servers):
            return
        nodes: dict[Part, str] = {}
        parts: dict[Part, Coroutine[Any, Any, None]]
        parts = {server: _note(nodes, server, server.node()) for server in servers}
        parts[TRAINER] = _note(nodes, TRAINER, self._trainer.node())
        await self._all(parts)
        host = LOOPBACK if len(set(nodes.values())) == 1 else nodes[TRAINER]
        meeting = await self._trainer.open_group(host, 1 + len(servers) * self._ranks)
        parts = {s: s.join_group(meeting, 1 + i * self._ranks) for i, s in enumerate(servers)}
        parts[TRAINER] = self._trainer.join_group()
        await self._all(parts)
        self._members = tuple(servers)

    async def _buckets(self, version: int, servers: Sequence[BroadcastSink]) -> Sent:
        """Every bucket, one on its way while the next is gathered."""
        found: dict[str, Announced] = {}
        size = Sent()
        await self._all({GATHER: size.gathering(_note(found, "next", self._trainer.next_bucket()))})
        while True:
            announced = found["next"]
            parts: dict[Part, Coroutine[Any, Any, None]] = {
                server: server.take_broadcast(announced, version) for server in servers
            }
            parts[TRAINER] = size.sending(self._trainer.send_bucket(version))
            if not announced.last:
                parts[GATHER] = size.gathering(_note(found, "next", self._trainer.next_bucket()))
            await self._all(parts)
            size.bytes, size.buckets = size.bytes + announced.nbytes, size.buckets + 1
            if announced.last:
                return size

    async def _all(self, parts: Parts) -> None:
        """Do all parts together. Raises: Broken, once nobody waits for another any more; what the trainer
        raises where it is gone.
        """
        tasks = {who: asyncio.ensure_future(part) for who, part in parts.items()}
        try:
            _, waiting = await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_EXCEPTION)
            if not any(task.done() and task.exception() for task in tasks.values()):
                return
            await self._trainer.drop_group()
            if waiting:
                await asyncio.wait(waiting, timeout=GRACE_S)
            raise _broken(tasks)
        finally:
            for task in tasks.values():
                task.add_done_callback(lambda task: task.cancelled() or task.exception())
                task.cancel()


async def _leave(server: BroadcastSink) -> None:
    """Out of its group, if it is still there: the next call to one that is gone says so."""
    with suppress(MilesError):
        await server.leave_group()


async def _note(found: dict[Any, Any], key: Any, answer: Awaitable[Any]) -> None:
    found[key] = await answer


def _broken(tasks: Mapping[Part, asyncio.Future[None]]) -> Broken:
    """What is left of a broadcast. Raises: what is neither the loss of a server nor an update that failed."""
    lost: dict[BroadcastSink, WorkerLost] = {}
    reasons = []
    for who, task in tasks.items():
        error = task.exception() if task.done() else None
        if not isinstance(who, str):
            if not task.done():
                error = WorkerLost(who.name, f"it did not answer within {GRACE_S:g} s of a broadcast's end")
            if isinstance(error, WorkerLost):
                lost[who] = error
        if error is None:
            continue
        if not isinstance(error, UpdateFailed) and error not in lost.values():
            raise error
        assert isinstance(error, MilesError)
        reasons.append(error.why or error.what)
    return Broken("; ".join(dict.fromkeys(reasons)), lost)
