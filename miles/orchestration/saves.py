"""Checkpoints as the driver writes them: at once, or beside the steps that follow.

Beside them, a checkpoint lies in its temporary directory until the trainer has written its part and every
file is summed up and on disk; only then does it get its name and become the newest. A run that dies before
goes on from the one before. One is on its way at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from miles.errors import MilesError
from miles.orchestration.checkpoints import CheckpointStore, LoopState, Partial

Write = Callable[[Path], Awaitable[None]]
"""Write everything of a checkpoint into a directory, or begin to."""


class Saving(Protocol):
    """A trainer whose `save` returns before the files are whole."""

    async def saved(self, *, wait: bool) -> bool:
        """Whether they are; `wait` until then. Called between two other calls."""


@dataclass
class OnItsWay:
    """A checkpoint that is not complete. `blocked`: seconds that the run stood still for it."""

    partial: Partial
    began: float
    blocked: float
    completing: asyncio.Task[Path] | None = None


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint. `background`: seconds that it took beside the steps, None where it took none."""

    path: Path
    step: int
    blocked: float
    background: float | None = None


class Saves:
    """Where the run's checkpoints go, and the one on its way."""

    def __init__(self, store: CheckpointStore, trainer: Saving, beside: bool) -> None:
        self._store, self._trainer, self._beside = store, trainer, beside
        self._current: OnItsWay | None = None

    def has(self, step: int) -> bool:
        """Whether the newest checkpoint, or the one on its way, is of this step."""
        return step == (self._store.latest_step() if self._current is None else self._current.partial.step)

    async def save(self, state: LoopState, write: Write) -> Saved | None:
        """Write a checkpoint; None while it is on its way. None other is (`settled`)."""
        assert self._current is None, "one checkpoint at a time"
        began = time.perf_counter()
        if not self._beside:
            return Saved(await self._store.save(state, write), state.step, time.perf_counter() - began)
        partial = await self._store.begin(state, write)
        now = time.perf_counter()
        self._current = OnItsWay(partial, now, now - began)
        return None

    async def settled(self, *, wait: bool) -> Saved | None:
        """The checkpoint that was on its way and is complete now; `wait` for it.

        Raises CheckpointError when it could not be written, whoever found out.
        """
        current = self._current
        if current is None:
            return None
        began = time.perf_counter()
        try:
            path = await self._advance(current, wait)
        except MilesError:
            self._current = None
            self._store.abandon(current.partial)
            raise
        current.blocked += time.perf_counter() - began
        if path is None:
            return None
        self._current = None
        background = time.perf_counter() - current.began
        return Saved(path, current.partial.step, current.blocked, background)

    async def _advance(self, current: OnItsWay, wait: bool) -> Path | None:
        if current.completing is None:
            if not await self._trainer.saved(wait=wait):
                return None
            # Reading all files again for their sums takes a while.
            complete = asyncio.to_thread(self._store.complete, current.partial)
            current.completing = asyncio.create_task(complete)
        if not wait and not current.completing.done():
            return None
        # The files are summed up to their end, whatever ends the run meanwhile.
        return await asyncio.shield(current.completing)
