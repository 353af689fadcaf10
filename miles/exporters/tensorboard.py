"""A run as TensorBoard event files: one directory per run, metric names as they are."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from miles.exporters.event_file import EventFile

SUFFIX = ".miles"


class TensorBoardSink:
    """Writes `<directory>/events.out.tfevents.<time>.<part>.miles`, a new file for each start of the run.

    TensorBoard reads the files of a directory in the order of their names.
    """

    def __init__(self, directory: Path, clock: float | None = None) -> None:
        self._directory = directory
        self._file = self._open(time.time() if clock is None else clock)

    def log(self, step: int, time: float, metrics: Mapping[str, float]) -> None:
        self._file.scalars(step, time, metrics)

    def rewind(self, step: int) -> None:
        self._file.close()
        self._file = self._open(time.time())
        self._file.session_start(step + 1, time.time())

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _open(self, now: float) -> EventFile:
        part = len(list(self._directory.glob(f"events.out.tfevents.*{SUFFIX}")))
        return EventFile(self._directory / f"events.out.tfevents.{int(now):010d}.{part:04d}{SUFFIX}", now)


def clear(directory: Path) -> None:
    """Remove the event files that miles wrote into `directory`; those of others stay."""
    for path in directory.glob(f"events.out.tfevents.*{SUFFIX}"):
        path.unlink()
