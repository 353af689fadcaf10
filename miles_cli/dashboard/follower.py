"""The loop that reads the runs in a thread and tells the screen what it found, a few times a second."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from miles.errors import RunError
from miles_cli.dashboard.feed import RunFeed
from miles_cli.dashboard.snapshot import RunSnapshot

INTERVAL = 0.25
"""Seconds between two looks at the files, and so between two redraws."""
HEARTBEAT_EVERY = 2.0
"""Seconds after which status and heartbeats are told again though nothing was written."""


class Follower:
    """Follows several runs until `stop()`. `tell` gets the snapshots, `trouble` an error that may pass."""

    def __init__(
        self,
        run_dirs: list[Path],
        tell: Callable[[tuple[RunSnapshot, ...]], None],
        trouble: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._run_dirs, self._tell = list(run_dirs), tell
        self._trouble, self._clock = trouble, clock
        self._stop = threading.Event()

    def stop(self) -> None:
        self._stop.set()

    def add(self, run_dir: Path) -> None:
        """Follow one more run; it is told after the others."""
        self._run_dirs.append(run_dir)

    def run(self) -> None:
        """Read until stopped; call it in a thread of its own."""
        feeds: list[RunFeed] = []
        self._open_new(feeds)
        self._tell(tuple(feed.snapshot() for feed in feeds))
        told, unseen = time.monotonic(), False
        while not self._stop.wait(0.0 if any(feed.loading for feed in feeds) else INTERVAL):
            try:
                unseen = self._open_new(feeds) or unseen
                # Every feed advances, so no short-circuit.
                unseen = sum(feed.advance() for feed in feeds) > 0 or unseen
                due = time.monotonic() - told
                if due >= HEARTBEAT_EVERY or (unseen and due >= INTERVAL):
                    self._tell(tuple(feed.snapshot() for feed in feeds))
                    told, unseen = time.monotonic(), False
            except (OSError, RunError) as error:
                # A network file system may be away for a moment; what is on the screen stays.
                self._trouble(str(error))

    def _open_new(self, feeds: list[RunFeed]) -> bool:
        """Open the runs that were added; whether there were any."""
        fresh = self._run_dirs[len(feeds) :]
        feeds += [RunFeed(run_dir, self._clock) for run_dir in fresh]
        return bool(fresh)
