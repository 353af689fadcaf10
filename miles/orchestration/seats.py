"""A seat: the place of one worker process, which is filled again when the process is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Generic, Protocol, TypeVar

from miles.errors import RunError
from miles.orchestration.worker_loss import WorkerLost

Report = Callable[..., None]
"""Called as report(kind, **fields) when a worker is lost or replaced."""


class Worker(Protocol):
    """A process that can be ended."""

    def kill(self) -> None:
        """End the process at once; ending a dead one does nothing."""


W = TypeVar("W", bound=Worker)


class Seat(Generic[W]):
    """Holds the living worker of one name, and counts how often it had to be replaced."""

    def __init__(
        self, name: str, launch: Callable[[], Awaitable[W]], max_restarts: int, report: Report
    ) -> None:
        """`launch` starts a worker and returns when it is ready to serve; it may raise WorkerLost."""
        self.name = name
        self._launch, self._max_restarts, self._report = launch, max_restarts, report
        self._worker: W | None = None
        self._restarts = 0
        self._replacing = asyncio.Lock()
        self._dismissed = False

    @property
    def worker(self) -> W:
        """The worker that serves now."""
        assert self._worker is not None, f"{self.name} was not started"
        return self._worker

    async def fill(self) -> None:
        """Start the first worker."""
        self._worker = await self._launch()

    async def replace(self, dead: W, lost: WorkerLost) -> None:
        """Start another worker in place of `dead`; callers who saw the same death wait for the same one.

        Raises: RunError when the worker was lost once too often; `lost` when the seat was dismissed.
        """
        async with self._replacing:
            if self._worker is not dead:
                return
            while True:
                if self._dismissed:
                    raise lost
                self._report("worker_dead", worker=self.name, reason=lost.reason)
                self._refuse_endless(lost)
                self._restarts += 1
                dead.kill()
                try:
                    successor = await self._launch()
                except WorkerLost as again:
                    lost = again
                    continue
                if self._dismissed:
                    successor.kill()
                    raise lost
                self._worker = successor
                self._report("restart", worker=self.name, restarts=self._restarts)
                return

    def dismiss(self) -> None:
        """End the worker, and one that is being started in its place; requests in flight bring none back."""
        self._dismissed = True
        if self._worker is not None:
            self._worker.kill()

    def _refuse_endless(self, lost: WorkerLost) -> None:
        if self._restarts >= self._max_restarts:
            raise RunError(
                f"{self.name} was lost {self._restarts + 1} times",
                why=lost.reason,
                fix=f"look at logs/{self.name}.log (max_worker_restarts = {self._max_restarts})",
            )


async def call(seat: Seat[W], request: Callable[[W], Awaitable[Any]]) -> Any:
    """Ask the worker of a seat, and its successor when it is lost on the way. For requests without effect."""
    while True:
        worker = seat.worker
        try:
            return await request(worker)
        except WorkerLost as lost:
            await seat.replace(worker, lost)
