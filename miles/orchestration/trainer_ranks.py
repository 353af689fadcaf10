"""The ranks of one trainer as the loop sees them: one trainer."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from miles.data.sample import Sample
from miles.orchestration.seats import Worker
from miles.orchestration.sglang_servers import DiskPacket
from miles.orchestration.turns import Held
from miles.orchestration.worker_loss import WorkerLost
from miles.rollout.sglang.weight_payload import Announced, Meeting
from miles.training.trainer import TrainResult

LOOPBACK = "127.0.0.1"

GRACE_SECONDS = 10.0
"""How long the other ranks may take to answer when one has failed."""


class TrainerRank(Worker, Protocol):
    """One rank in another process. Every method may raise WorkerLost."""

    async def node(self) -> str:
        """The address of its machine."""

    async def open_store(self, host: str) -> int:
        """Listen for the other ranks; the port."""

    async def join(self, rank: int, size: int, meeting: tuple[str, int] | None) -> None:
        """Join the others and load the first weights."""

    def share(self, samples: Sequence[Sample]) -> Any:
        """The samples in the form that `train` takes, once for all ranks."""

    async def train(self, shared: Any) -> TrainResult: ...

    async def update_reference(self) -> None: ...

    async def set_knobs(self, patch: Mapping[str, float]) -> None: ...

    async def save(self, directory: Path, *, optimizer: bool = True) -> None: ...

    async def saved(self, *, wait: bool) -> bool: ...

    async def load(self, directory: Path) -> None: ...

    async def weights(self, version: int) -> Any: ...

    async def write_weights(self, version: int) -> DiskPacket:
        """The weights as a checkpoint that every server can read."""

    async def hold(self, held: Held) -> None: ...

    async def next_handles(self, version: int) -> tuple[str, bool]: ...

    async def drop_handles(self) -> None: ...

    async def open_group(self, host: str, size: int) -> Meeting: ...

    async def join_group(self) -> None: ...

    async def next_bucket(self) -> Announced: ...

    async def gather_along(self) -> None:
        """Take part in the gather of all weights, for a rank that keeps none of them."""

    async def send_bucket(self, version: int) -> None: ...

    async def drop_group(self) -> None: ...


class TrainerRanks:
    """Implements `driver.TrainSide`, `weight_sync.WeightSource` and `broadcast_weights.BroadcastSource` over
    all ranks, which are called together.

    Results are those of the first rank: losses and metrics are the same on all of them, and it is the one
    that writes checkpoints and packs weights.
    """

    def __init__(self, ranks: Sequence[TrainerRank]) -> None:
        self._ranks = tuple(ranks)
        self.still, self.learnt = asyncio.Lock(), 0
        self._along: list[asyncio.Future[None]] = []
        """The other ranks' parts in the gather that is under way."""

    async def join(self) -> None:
        """Let the ranks meet: on loopback where all are on one machine, else on the first one's address."""
        meeting, size = None, len(self._ranks)
        if size > 1:
            nodes = await together([rank.node() for rank in self._ranks])
            host = LOOPBACK if len(set(nodes)) == 1 else nodes[0]
            meeting = (host, await self._ranks[0].open_store(host))
        await together([rank.join(index, size, meeting) for index, rank in enumerate(self._ranks)])

    async def train(self, samples: Sequence[Sample]) -> TrainResult:
        shared = self._ranks[0].share(samples)
        async with self.still:
            self.learnt += 1
            result: TrainResult = (await together([rank.train(shared) for rank in self._ranks]))[0]
        return result

    async def update_reference(self) -> None:
        await together([rank.update_reference() for rank in self._ranks])

    async def set_knobs(self, patch: Mapping[str, float]) -> None:
        await together([rank.set_knobs(patch) for rank in self._ranks])

    async def save(self, directory: Path, *, optimizer: bool = True) -> None:
        await together([rank.save(directory, optimizer=optimizer) for rank in self._ranks])

    async def saved(self, *, wait: bool) -> bool:
        return all(await together([rank.saved(wait=wait) for rank in self._ranks]))

    async def load(self, directory: Path) -> None:
        async with self.still:
            await together([rank.load(directory) for rank in self._ranks])

    async def weights(self, version: int) -> Any:
        return (await together([rank.weights(version) for rank in self._ranks]))[0]

    async def write_weights(self, version: int) -> DiskPacket:
        """The first rank writes; the others take part in the gather."""
        first, *others = self._ranks
        calls = [first.write_weights(version), *(rank.gather_along() for rank in others)]
        packet: DiskPacket = (await together(calls))[0]
        return packet

    async def hold(self, held: Held) -> None:
        await together([rank.hold(held) for rank in self._ranks])

    async def next_handles(self, version: int) -> tuple[list[str], bool]:
        given = await together([rank.next_handles(version) for rank in self._ranks])
        return [payload for payload, _ in given], given[0][1]

    async def drop_handles(self) -> None:
        await together([rank.drop_handles() for rank in self._ranks])

    async def node(self) -> str:
        return await self._ranks[0].node()

    async def open_group(self, host: str, size: int) -> Meeting:
        return await self._ranks[0].open_group(host, size)

    async def join_group(self) -> None:
        await self._ranks[0].join_group()

    async def next_bucket(self) -> Announced:
        """What the first rank is to send next; the others go through the whole gather at once."""
        if not self._along:
            self._along = [asyncio.ensure_future(rank.gather_along()) for rank in self._ranks[1:]]
        bucket = asyncio.ensure_future(self._ranks[0].next_bucket())
        calls: list[asyncio.Future[Any]] = [bucket, *self._along]
        while not bucket.done():
            going = [call for call in calls if not call.done()]
            await asyncio.wait(going, return_when=asyncio.FIRST_COMPLETED)
            if any(call.done() and call.exception() for call in self._along):
                break
        if not bucket.done() or bucket.exception() is not None:
            # It is the loss of a rank that is told, not the connections that it broke.
            await together([_of(call) for call in calls])
        announced = bucket.result()
        if announced.last:
            along, self._along = self._along, []
            await asyncio.gather(*along)
        return announced

    async def send_bucket(self, version: int) -> None:
        await self._ranks[0].send_bucket(version)

    async def drop_group(self) -> None:
        await self._ranks[0].drop_group()
        along, self._along = self._along, []
        await asyncio.gather(*along)


class WrittenWeights:
    """Implements `weight_sync.WeightSource`: weights by a directory that trainer and servers share."""

    def __init__(self, trainer: TrainerRanks) -> None:
        self._trainer = trainer

    async def weights(self, version: int) -> DiskPacket:
        return await self._trainer.write_weights(version)


async def _of(call: asyncio.Future[Any]) -> Any:
    return await call


async def together(calls: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """The results of calls to all ranks, in rank order.

    Raises what a rank raised; its partners may be waiting for it and are not waited for longer than
    `GRACE_SECONDS`. A lost process is reported rather than the broken connections it left behind.
    """
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        _, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if waiting:
            await asyncio.wait(waiting, timeout=GRACE_SECONDS)
        errors = [error for task in tasks if task.done() and (error := task.exception()) is not None]
        if errors:
            raise next((error for error in errors if isinstance(error, WorkerLost)), errors[0])
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
