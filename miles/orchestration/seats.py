"""A seat: the place of one worker process, which is filled again when the process is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Generic, Protocol, TypeVar

from miles.errors import MilesError, RunError, Unavailable
from miles.orchestration.worker_loss import WorkerLost
from miles.record import events

Report = Callable[..., None]
"""Called as report(kind, **fields) when a worker is lost or replaced, or could not be."""

START_PAUSE_S = 5.0
"""Seconds before a start that failed is tried again: what it lacked may come back. Doubled every time."""


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
        """`launch` starts a worker and returns when it is ready to serve.

        What it raises of WorkerLost and Unavailable is tried again.
        """
        self.name = name
        self._launch, self._max_restarts, self._report = launch, max_restarts, report
        self._worker: W | None = None
        self._restarts = 0
        self._replacing = asyncio.Lock()
        self._dismissed = asyncio.Event()
        self._given_up: MilesError | None = None

    @property
    def worker(self) -> W:
        """The worker that serves now."""
        assert self._worker is not None, f"{self.name} was not started"
        return self._worker

    @property
    def vacant(self) -> bool:
        """Whether another worker is being started in its place."""
        return self._replacing.locked()

    async def fill(self) -> None:
        """Start the first worker."""
        self._worker = await self._launch()

    async def replace(self, dead: W, lost: WorkerLost) -> None:
        """Start another worker in place of `dead`; callers who saw the same death wait for the same one.

        A start that fails is told and tried again after a pause, each time a longer one.

        Raises: what a seat that stays empty is given up for, to every caller; `lost` when it was dismissed.
        """
        async with self._replacing:
            if self._worker is not dead:
                return
            if self._given_up is not None:
                raise self._given_up
            try:
                successor = await self._successor(dead, lost)
            except MilesError as failed:
                self._given_up = failed
                raise
            self._worker = successor
            self._report(events.RESTART, worker=self.name, restarts=self._restarts)

    async def _successor(self, dead: W, lost: WorkerLost) -> W:
        self._refuse_dismissed(lost)
        self._report(events.WORKER_DEAD, worker=self.name, reason=lost.reason)
        failed: WorkerLost | Unavailable = lost
        pause = START_PAUSE_S
        while True:
            self._refuse_endless(failed)
            self._restarts += 1
            dead.kill()
            try:
                successor = await self._launch()
            except (WorkerLost, Unavailable) as again:
                failed = again
                self._refuse_dismissed(lost)
                self._tell_failed_start(failed)
                await self._pause(pause)
                self._refuse_dismissed(lost)
                pause *= 2
                continue
            except MilesError as hopeless:
                self._tell_failed_start(hopeless)
                raise
            if self._dismissed.is_set():
                successor.kill()
                raise lost
            return successor

    async def _pause(self, seconds: float) -> None:
        """A dismissal ends it."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._dismissed.wait(), seconds)

    def _tell_failed_start(self, failed: MilesError) -> None:
        left = self._max_restarts - self._restarts
        reason = failed.reason if isinstance(failed, WorkerLost) else failed.in_one_line
        self._report(events.RESTART_FAILED, worker=self.name, reason=reason, restarts_left=left)

    def _refuse_dismissed(self, lost: WorkerLost) -> None:
        if self._dismissed.is_set():
            raise lost

    def dismiss(self) -> None:
        """End the worker, and one that is being started in its place; requests in flight bring none back."""
        self._dismissed.set()
        if self._worker is not None:
            self._worker.kill()

    def _refuse_endless(self, failed: WorkerLost | Unavailable) -> None:
        if self._restarts < self._max_restarts:
            return
        limit = f"(max_worker_restarts = {self._max_restarts})"
        if isinstance(failed, WorkerLost):
            raise RunError(
                f"{self.name} was lost {self._restarts + 1} times",
                why=failed.reason,
                fix=f"look at logs/{self.name}.log {limit}",
            )
        raise Unavailable(
            f"{self.name} was lost, and no other could be started in its place",
            why=failed.in_one_line,
            fix=f"{failed.fix or f'look at logs/{self.name}.log'} {limit}",
        )


@contextmanager
def ended_unless_ready(worker: Worker) -> Iterator[None]:
    """End a worker process that the body does not bring to serve."""
    try:
        yield
    except BaseException:
        worker.kill()
        raise


async def call(seat: Seat[W], request: Callable[[W], Awaitable[Any]]) -> Any:
    """Ask the worker of a seat, and its successor when it is lost on the way. For requests without effect."""
    while True:
        worker = seat.worker
        try:
            return await request(worker)
        except WorkerLost as lost:
            await seat.replace(worker, lost)
