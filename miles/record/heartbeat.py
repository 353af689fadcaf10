"""Proof of life: a small file per writer, replaced every few seconds by a thread of its process."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from miles.errors import RunError
from miles.record.json_file import read_json, write_json

STALE_INTERVALS = 12
"""A heartbeat from another machine that missed this many beats speaks for a dead process."""


@dataclass(frozen=True)
class Heartbeat:
    """What a process last said of itself. Times are seconds since the epoch."""

    writer: str
    pid: int
    host: str
    attempt: int
    time: float
    interval: float
    phase: str | None = None
    step: int | None = None
    process_start: str | None = None
    """Start time of the process in clock ticks since boot (Linux): tells it from a later one with its pid."""

    def alive(self, now: float | None = None) -> bool:
        """Whether the process still exists: asked of the kernel on the same machine, else judged by age."""
        if self.host == socket.gethostname():
            return process_exists(self.pid, self.process_start)
        age = (time.time() if now is None else now) - self.time
        return age <= STALE_INTERVALS * self.interval


def process_start(pid: int) -> str | None:
    """The kernel's start stamp of `pid`, None where /proc does not tell or the process has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZX" else rest[18]


def process_exists(pid: int, started: str | None) -> bool:
    """Whether process `pid` that started at `started` is alive (a zombie is not)."""
    if started is not None:
        return process_start(pid) == started
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read_heartbeats(heartbeat_dir: Path) -> dict[str, Heartbeat]:
    """Heartbeats by writer; a file that cannot be read is left out."""
    known = {f.name for f in fields(Heartbeat)}
    found = {}
    for path in sorted(heartbeat_dir.glob("*.json")):
        try:
            values = read_json(path)
        except RunError:
            continue
        if {"writer", "pid", "host", "attempt", "time", "interval"} <= values.keys():
            found[path.stem] = Heartbeat(**{k: v for k, v in values.items() if k in known})
    return found


class Pulse:
    """Writes one writer's heartbeat every `interval` seconds until stopped.

    `state` gives the current phase and step; `on_error` hears of an OSError. The beat runs in a daemon
    thread, so a process that hangs still says in which phase, and one that is killed falls silent.
    """

    def __init__(
        self,
        path: Path,
        writer: str,
        attempt: int,
        interval: float,
        state: Callable[[], dict[str, Any]],
        on_error: Callable[[OSError], None],
    ) -> None:
        self._path, self._state, self._on_error, self.interval = path, state, on_error, interval
        self._identity = Heartbeat(
            writer=writer,
            pid=os.getpid(),
            host=socket.gethostname(),
            attempt=attempt,
            time=0.0,
            interval=interval,
            process_start=process_start(os.getpid()),
        )
        self._last = float("-inf")
        self._busy = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"heartbeat-{writer}", daemon=True)

    def start(self) -> None:
        self.beat()
        self._thread.start()

    def beat(self) -> None:
        """Write the file, unless one was written less than an interval ago or another thread is at it."""
        if time.monotonic() - self._last < self.interval or not self._busy.acquire(blocking=False):
            return
        try:
            write_json(self._path, asdict(self._identity) | {"time": time.time()} | self._state())
            self._last = time.monotonic()
        except OSError as error:
            self._on_error(error)
        finally:
            self._busy.release()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            self.beat()
