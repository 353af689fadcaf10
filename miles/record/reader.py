"""The reading side: one run directory, read while others write it, tolerant of torn lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from miles.errors import RunError
from miles.record import events as kinds
from miles.record.encoding import decode_line
from miles.record.heartbeat import Heartbeat, read_heartbeats
from miles.record.history import History, Phase, Row, Series
from miles.record.json_file import read_json
from miles.record.layout import RunLayout
from miles.record.skim import ENVELOPE, end_of_last_line, skim_file
from miles.record.status import RunStatus, run_status

_CHUNK = 1 << 24


class RunReader:
    """Reads the record of `run_dir`. What was written later comes in with `poll()`.

    With `read=False` nothing is read yet: `poll(max_bytes)` then takes it in piece by piece, or `skim()`
    shows its outline at once. Raises RunError when the directory is not a run directory.
    """

    def __init__(self, run_dir: str | Path, read: bool = True) -> None:
        self.layout = RunLayout(run_dir)
        if not self.layout.root.is_dir():
            raise RunError(
                "there is no such run", where=str(run_dir), fix="list the runs with: miles runs ls"
            )
        if not self.layout.events_dir.is_dir() and not self.layout.meta.exists():
            raise RunError(
                "this is not a run directory: it has neither meta.json nor events/", where=str(run_dir)
            )
        self.history = History()
        self.bad_lines = 0
        """Lines that could not be read: torn by a full disk and never mended."""
        self._offsets: dict[Path, int] = {}
        if read:
            self.poll()

    def poll(self, max_bytes: int | None = None) -> list[dict[str, Any]]:
        """Read what was appended since the last call, at most `max_bytes` of each file (or one whole line).

        Returns the new live records.
        """
        new: list[dict[str, Any]] = []
        for path in self._event_files():
            for record in self._read_new(path, max_bytes):
                if self.history.ingest(record):
                    new.append(record)
        return new

    def skim(self, blocks: int = 256, block_bytes: int = 1 << 14) -> None:
        """Read `blocks` pieces spread over the files and the end of each: an outline, whatever the size.

        Rows between the pieces are missing, phases are known only of the end; `poll()` goes on from there.
        """
        for path in self._event_files():
            for record in skim_file(path, blocks, block_bytes):
                self.history.ingest(record)
            self._offsets[path] = end_of_last_line(path)

    @property
    def unread_bytes(self) -> int:
        """How much the files hold beyond what was read."""
        return sum(path.stat().st_size - self._offsets.get(path, 0) for path in self._event_files())

    @property
    def run_id(self) -> str:
        return self.layout.root.resolve().name

    @property
    def meta(self) -> dict[str, Any]:
        return read_json(self.layout.meta) if self.layout.meta.exists() else {}

    @property
    def config(self) -> dict[str, Any]:
        """The resolved values by section, as plain data: {"optimizer": {"lr": 4e-4, …}, …}."""
        return self._config_file().get("values", {})

    @property
    def origins(self) -> dict[str, Any]:
        """Where each value came from, by dotted key."""
        return self._config_file().get("origins", {})

    @property
    def attempt(self) -> int:
        """The highest attempt seen, 0 for a run that has not begun."""
        return self.history.attempt

    def rows(self) -> list[Row]:
        """Metrics, one row per step, superseded attempts left out."""
        return self.history.rows()

    def series(self, name: str) -> Series:
        """One metric over the steps; empty when it was never reported."""
        return self.history.series.get(name, Series())

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Events in order of time: all that are neither metrics nor phases, or those of one kind."""
        return self.history.events() if kind is None else self.history.of_kind(kind)

    def alerts(self) -> list[dict[str, Any]]:
        return self.history.of_kind(kinds.ALERT)

    def phases(self) -> list[Phase]:
        return self.history.phases

    def heartbeats(self) -> dict[str, Heartbeat]:
        return read_heartbeats(self.layout.heartbeat_dir)

    def status(self) -> RunStatus:
        return run_status(self.layout)

    def samples(self, step: int) -> list[dict[str, Any]]:
        """Samples kept of `step`, those of the latest attempt that still counts; [] when none were."""
        path = self.layout.samples(step)
        if not path.exists():
            return []
        records = [r for line in path.read_bytes().splitlines() if (r := decode_line(line)) is not None]
        live = [r for r in records if self.history.is_live(r["attempt"], r["step"])]
        latest = max((r["attempt"] for r in live), default=0)
        return [r for r in live if r["attempt"] == latest]

    def sample_steps(self) -> list[int]:
        """Steps of which samples were kept."""
        found = (int(p.stem.removeprefix("step-")) for p in self.layout.samples_dir.glob("step-*.jsonl"))
        return [step for step in sorted(found) if self.samples(step)]

    def _event_files(self) -> list[Path]:
        return sorted(self.layout.events_dir.glob("*.jsonl"))

    def _config_file(self) -> dict[str, Any]:
        return read_json(self.layout.config_json) if self.layout.config_json.exists() else {}

    def _read_new(self, path: Path, max_bytes: int | None = None) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        with path.open("rb") as file:
            file.seek(self._offsets.get(path, 0))
            tail, taken = b"", 0
            while chunk := file.read(min(_CHUNK, max_bytes or _CHUNK)):
                taken += len(chunk)
                *lines, tail = (tail + chunk).split(b"\n")
                for line in filter(None, lines):
                    record = decode_line(line)
                    if record is not None and record.keys() >= ENVELOPE:
                        records.append(record)
                    else:
                        self.bad_lines += 1
                if max_bytes is not None and taken >= max_bytes and len(tail) < taken:
                    break
            # A line without its newline is still being written, or torn: it is read again next time.
            self._offsets[path] = file.tell() - len(tail)
        return records
