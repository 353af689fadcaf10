"""What of a conversion is on the disk already, so that one that was killed goes on where it stopped.

.TARGET.partial/plan.json       what is converted into what: another conversion does not go on from here
.TARGET.partial/journal.jsonl   a line for weights that were flushed to the disk, and for hashes of files
.TARGET.partial/files/          the target, not yet complete
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from miles.errors import CheckpointError
from miles.weights.convert.plan import partial_directory
from miles.weights.convert.shard_file import ShardFile
from miles.weights.convert.transfer import Outcome

FLUSH_BYTES = 1 << 28
"""Bytes that are written between two flushes to the disk, hence at most lost in a kill."""


class Journal:
    """Credits weights once their bytes are safe. Used by several threads at once."""

    def __init__(self, target: Path, fingerprint: Mapping[str, Any]) -> None:
        """Open, or go on with, the work on `target`. Raises CheckpointError while another process does."""
        self.directory = partial_directory(target)
        self.files = self.directory / "files"
        self.outcomes: dict[str, Outcome] = {}
        """Of weights that are safe."""
        self.hashes: dict[str, str] = {}
        """SHA-256 of complete files of the target."""
        self.places: dict[str, dict[str, tuple[int, int]]] = {}
        """Where a file that was written from front to back has its tensors."""
        self.discarded = False
        """Whether there was work on another conversion into the same target."""
        self._guard = threading.Lock()
        self._pending: dict[str, Outcome] = {}
        self._pending_files: set[ShardFile] = set()
        self._pending_bytes = 0
        self._lock_file = _locked(self.directory, target)
        if not self._go_on(fingerprint):
            self._begin(fingerprint)
        self._file = (self.directory / "journal.jsonl").open("a", encoding="utf-8")

    def add(self, outcomes: dict[str, Outcome], file: ShardFile, nbytes: int) -> None:
        """Weights that were written into a file; they are credited with the next flush."""
        with self._guard:
            self._pending |= outcomes
            self._pending_files.add(file)
            self._pending_bytes += nbytes
            due = self._pending_bytes >= FLUSH_BYTES
        if due:
            self.flush()

    def flush(self) -> None:
        """Bring everything to the disk that was added, then credit it."""
        with self._guard:
            outcomes, files = self._pending, self._pending_files
            self._pending, self._pending_files, self._pending_bytes = {}, set(), 0
        for file in files:
            file.flush()
        if outcomes:
            self._write({"weights": outcomes})
        with self._guard:
            self.outcomes |= outcomes

    def add_hash(self, file: str, sha256: str) -> None:
        """A file that is complete."""
        self.hashes[file] = sha256
        self._write({"file": file, "sha256": sha256})

    def add_file(
        self, file: str, sha256: str, outcomes: dict[str, Outcome], places: dict[str, tuple[int, int]]
    ) -> None:
        """A file that was written as a whole and is safe, with its weights."""
        self.hashes[file], self.places[file] = sha256, places
        self._write({"file": file, "sha256": sha256, "weights": outcomes, "places": places})
        with self._guard:
            self.outcomes |= outcomes

    def close(self, remove: bool) -> None:
        """Stop working; with `remove` nothing of the work is kept."""
        self._file.close()
        if remove:
            shutil.rmtree(self.directory, ignore_errors=True)
        self._lock_file.close()

    def _write(self, line: dict[str, Any]) -> None:
        with self._guard:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def _go_on(self, fingerprint: Mapping[str, Any]) -> bool:
        plan = self.directory / "plan.json"
        if not plan.is_file():
            return False
        if plan.read_text(encoding="utf-8") != _text(fingerprint):
            self.discarded = True
            return False
        for line in _lines(self.directory / "journal.jsonl"):
            self.outcomes |= line.get("weights", {})
            if "file" in line:
                self.hashes[line["file"]] = line["sha256"]
                places = line.get("places", {})
                self.places[line["file"]] = {name: tuple(place) for name, place in places.items()}
        return True

    def _begin(self, fingerprint: Mapping[str, Any]) -> None:
        for path in (self.directory / "plan.json", self.directory / "journal.jsonl"):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.files, ignore_errors=True)
        self.files.mkdir()
        (self.directory / "plan.json").write_text(_text(fingerprint), encoding="utf-8")


def _locked(directory: Path, target: Path) -> Any:
    directory.mkdir(parents=True, exist_ok=True)
    file = (directory / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(
            "another process converts into it", where=str(target), fix="wait for it, or end it"
        ) from None
    return file


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines; the last one may be torn."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    whole: Iterable[str] = text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]
    return (json.loads(line) for line in whole)


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1, sort_keys=True) + "\n"
