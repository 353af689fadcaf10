"""Trainer and engines on the same GPUs take turns: who has memory of what, and when that changes.

rollout -> engines release everything -> the trainer takes its memory -> train -> it keeps its weights alone
-> engines take the memory of weights -> weights by handle -> the trainer gives up its weights -> engines take
their cache -> rollout.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, Protocol

from miles.rollout.sglang.control import MemoryTag

Held = Literal["nothing", "weights", "everything"]
"""What a trainer has on its GPUs; the rest of it lies in host memory."""

CACHE: tuple[MemoryTag, ...] = ("kv_cache", "cuda_graph")
WEIGHTS: tuple[MemoryTag, ...] = ("weights",)


class Turns(Protocol):
    """What the driver says between the phases of a step."""

    async def to_training(self) -> None:
        """No rollout runs any more; the trainer is next."""

    async def to_update(self) -> None:
        """The trainer is done; the engines are about to be given its weights."""

    async def to_rollout(self) -> None:
        """The engines have the weights; a rollout is next."""

    async def saving(self, save: Callable[[], Awaitable[None]]) -> None:
        """Run `save`, which needs all of the trainer, between two steps."""


class NoTurns:
    """Trainer and engines have memory of their own."""

    async def to_training(self) -> None: ...

    async def to_update(self) -> None: ...

    async def to_rollout(self) -> None: ...

    async def saving(self, save: Callable[[], Awaitable[None]]) -> None:
        await save()


class Releasing(Protocol):
    """An engine that gives memory back. Weights come back empty."""

    async def release(self, tags: Sequence[MemoryTag]) -> None: ...

    async def reclaim(self, tags: Sequence[MemoryTag]) -> None: ...


class Moving(Protocol):
    """A trainer that moves between GPU and host memory."""

    async def hold(self, held: Held) -> None: ...


class SharedGpus:
    """Engines and a trainer on the same GPUs. It begins with everything, they with nothing."""

    def __init__(
        self, trainer: Moving, engines: Sequence[Releasing], moves_trainer: bool, moves_engines: bool
    ) -> None:
        self._trainer, self._engines = trainer, engines
        self._moves_trainer, self._moves_engines = moves_trainer, moves_engines

    async def make_room(self) -> None:
        """Before there is a trainer."""
        await self._release((*CACHE, *WEIGHTS))

    async def to_training(self) -> None:
        await self._release((*CACHE, *WEIGHTS))
        await self._hold("everything")

    async def to_update(self) -> None:
        await self._hold("weights")
        await self._reclaim(WEIGHTS)

    async def to_rollout(self) -> None:
        await self._hold("nothing")
        await self._reclaim(CACHE)

    async def saving(self, save: Callable[[], Awaitable[None]]) -> None:
        """The engines keep their weights, which would have to be handed over again."""
        await self._release(CACHE)
        await self._hold("everything")
        await save()
        await self._hold("nothing")
        await self._reclaim(CACHE)

    async def _hold(self, held: Held) -> None:
        if self._moves_trainer:
            await self._trainer.hold(held)

    async def _release(self, tags: Sequence[MemoryTag]) -> None:
        if self._moves_engines:
            await asyncio.gather(*(engine.release(tags) for engine in self._engines))

    async def _reclaim(self, tags: Sequence[MemoryTag]) -> None:
        if self._moves_engines:
            await asyncio.gather(*(engine.reclaim(tags) for engine in self._engines))
