"""The ranks of one trainer as the loop sees them: one trainer."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from miles.data.sample import Sample
from miles.orchestration.seats import Worker
from miles.orchestration.turns import Held
from miles.orchestration.worker_loss import WorkerLost
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

    async def hold(self, held: Held) -> None: ...

    async def next_handles(self, version: int) -> tuple[str, bool]: ...

    async def drop_handles(self) -> None: ...


class TrainerRanks:
    """Implements `driver.TrainSide` and `weight_sync.WeightSource` over all ranks, which are called together.

    Results are those of the first rank: losses and metrics are the same on all of them, and it is the one
    that writes checkpoints and packs weights.
    """

    def __init__(self, ranks: Sequence[TrainerRank]) -> None:
        self._ranks = tuple(ranks)

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
        await together([rank.load(directory) for rank in self._ranks])

    async def weights(self, version: int) -> Any:
        return (await together([rank.weights(version) for rank in self._ranks]))[0]

    async def hold(self, held: Held) -> None:
        await together([rank.hold(held) for rank in self._ranks])

    async def next_handles(self, version: int) -> tuple[list[str], bool]:
        given = await together([rank.next_handles(version) for rank in self._ranks])
        return [payload for payload, _ in given], given[0][1]

    async def drop_handles(self) -> None:
        await together([rank.drop_handles() for rank in self._ranks])


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
