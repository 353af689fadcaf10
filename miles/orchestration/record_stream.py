"""A run directory as a stream of messages, and back: the record of a job where no file system is shared.

Files that are appended to travel as (path, offset, bytes), small ones that are replaced travel whole.
Applying a message twice changes nothing, so a log that is read again from its beginning does no harm.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from miles.errors import RunError
from miles.orchestration.job_wire import WireWriter

APPENDED = ("events/*.jsonl", "samples/*.jsonl", "logs/*.log")
REPLACED = ("heartbeat/*.json", "summary.json")
INTERVAL_SECONDS = 0.5
_CHUNK = 1 << 16


class RecordStream:
    """Sends what is new in a run directory, every half second until it is closed."""

    def __init__(self, run_dir: Path, wire: WireWriter, have: Mapping[str, int]) -> None:
        """`have`: bytes of each appended file that the other side holds already."""
        self._root, self._wire = run_dir, wire
        self._sent = dict(have)
        self._stamps: dict[Path, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="record-stream", daemon=True)

    def __enter__(self) -> RecordStream:
        self._thread.start()
        return self

    def __exit__(self, *ending: object) -> None:
        self._stop.set()
        self._thread.join()
        self.send_new()

    def send_new(self) -> None:
        """Send everything that was written since the last call."""
        for pattern in APPENDED:
            for path in sorted(self._root.glob(pattern)):
                self._send_tail(path)
        for pattern in REPLACED:
            for path in sorted(self._root.glob(pattern)):
                self._send_whole(path)

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            self.send_new()

    def _send_tail(self, path: Path) -> None:
        name = path.relative_to(self._root).as_posix()
        offset = self._sent.get(name, 0)
        with path.open("rb") as file:
            file.seek(offset)
            while chunk := file.read(_CHUNK):
                # Latin-1 gives every byte a character: any bytes survive JSON.
                self._wire.send("append", path=name, offset=offset, data=chunk.decode("latin-1"))
                offset += len(chunk)
        self._sent[name] = offset

    def _send_whole(self, path: Path) -> None:
        try:
            stamp, content = path.stat().st_mtime_ns, path.read_bytes()
        except FileNotFoundError:
            return  # being replaced
        if self._stamps.get(path) != stamp:
            self._stamps[path] = stamp
            name = path.relative_to(self._root).as_posix()
            self._wire.send("replace", path=name, data=content.decode("latin-1"))


class Mirror:
    """The copy of a job's record in a run directory of this machine."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def holds(self) -> dict[str, int]:
        """Bytes of every appended file."""
        paths = (path for pattern in APPENDED for path in self.run_dir.glob(pattern))
        return {path.relative_to(self.run_dir).as_posix(): path.stat().st_size for path in paths}

    def apply(self, message: Mapping[str, Any]) -> None:
        """Take in one `append` or `replace`. Raises: RunError for a path outside the run, or a gap."""
        target = self._inside(message["path"])
        data = message["data"].encode("latin-1")
        target.parent.mkdir(parents=True, exist_ok=True)
        if message["kind"] == "replace":
            partial = target.with_name(f".{target.name}.partial")
            partial.write_bytes(data)
            os.replace(partial, target)
            return
        size = target.stat().st_size if target.exists() else 0
        if message["offset"] > size:
            raise RunError(
                "the mirrored record has a gap",
                where=str(target),
                why=f"it holds {size} bytes, and the job's log goes on at {message['offset']}",
            )
        with target.open("ab") as file:
            file.write(data[size - message["offset"] :])

    @contextmanager
    def exclusive(self) -> Iterator[bool]:
        """Whether this process alone writes the mirror while the context lasts; False: another one does."""
        with (self.run_dir / ".mirror.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def _inside(self, name: str) -> Path:
        target = (self.run_dir / name).resolve()
        if not target.is_relative_to(self.run_dir.resolve()):
            raise RunError("the job's record names a file outside the run directory", where=name)
        return target
