"""The writing side: one append-only file per writer, one unbuffered write per line.

Emitting never blocks on another process and never raises into training: a line that cannot be written (disk
full) is counted, told once on stderr, and the gap is recorded as soon as writing works again.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from miles.errors import RunError
from miles.record import events as kinds
from miles.record.append import AppendFile
from miles.record.encoding import encode_line
from miles.record.heartbeat import Pulse
from miles.record.history import History
from miles.record.layout import RunLayout
from miles.record.metrics import find_metric
from miles.record.stack_file import StackFile


class RecordWriter:
    """Writes `events/<writer>.jsonl`, `heartbeat/<writer>.json` and `samples/` of one run directory, and
    answers SIGUSR2 with the stacks of the process in `heartbeat/<writer>.stacks`.

    `history`, when given, takes in every record too, so that a running trainer can be assessed
    without reading its own files. Raises RunError when the files cannot be opened at
    all; after that no OSError escapes.
    """

    def __init__(
        self,
        run_dir: str | Path,
        writer: str = "driver",
        attempt: int = 1,
        heartbeat_interval: float = 5.0,
        history: History | None = None,
    ) -> None:
        assert attempt >= 1
        self.layout = RunLayout(run_dir)
        self.writer, self.attempt, self.history = writer, attempt, history
        self.lost = 0
        """Lines that could not be written since writing last worked."""
        self._seq = 0
        self._told = False
        self._phases: list[str] = []
        self._step: int | None = None
        self.layout.make()
        path = self.layout.events(writer)
        try:
            self._file = AppendFile(path)
        except OSError as error:
            raise RunError(
                "the run record cannot be opened", where=str(path), why=str(error.strerror)
            ) from error
        if self._file.dropped_bytes:
            self.event(kinds.RECORD_REPAIRED, dropped_bytes=self._file.dropped_bytes)
        self._pulse = Pulse(
            self.layout.heartbeat(writer), writer, attempt, heartbeat_interval, self._state, self._report
        )
        self._pulse.start()
        self._stacks = self._answer_with_stacks()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics of `step`. Every name must be declared in `record/metrics/`."""
        for name in values:
            assert find_metric(name), f"metric {name!r} is not declared in miles/record/metrics/"
        self._step = step
        self._emit(kinds.METRICS, {"step": step, "metrics": {n: float(v) for n, v in values.items()}})
        self.heartbeat()

    def event(self, kind: str, *, step: int | None = None, **fields: Any) -> None:
        """Record something that happened. `step` is left out when it has none."""
        assert not kinds.RESERVED & fields.keys(), f"reserved field in {sorted(fields)}"
        body = fields if step is None else {"step": step, **fields}
        missing = [f for f in kinds.REQUIRED_FIELDS.get(kind, ()) if f not in body]
        assert not missing, f"event {kind!r} needs {missing}"
        self._emit(kind, body)

    def resume(self, step: int) -> None:
        """Say that this attempt continues from checkpoint `step`, so later rows of older ones are void."""
        assert self.attempt > 1, "the first attempt resumes nothing"
        self._step = step
        self.event(kinds.RESUME, step=step)

    def alert(
        self, *, rule: str, severity: str, title: str, step: int | None, state: str = "raised", **fields: Any
    ) -> None:
        """Record that rule `rule` fired (`state` raised) or that its signature is gone (cleared)."""
        assert state in ("raised", "cleared")
        self.event(kinds.ALERT, step=step, rule=rule, severity=severity, title=title, state=state, **fields)

    def exception(self, error: BaseException, *, step: int | None = None, worker: str | None = None) -> None:
        """Record an exception with its traceback, causes included."""
        self.event(
            kinds.EXCEPTION,
            step=step,
            type=type(error).__name__,
            message=str(error),
            traceback="".join(traceback.format_exception(error)),
            worker=worker or self.writer,
        )

    @contextmanager
    def phase(self, name: str, step: int | None = None) -> Iterator[None]:
        """Record start and end of a phase, with its duration and the name of an exception that ended it."""
        at = {} if step is None else {"step": step}
        start_seq = self._emit(kinds.PHASE_START, {**at, "phase": name})
        self._phases.append(name)
        if step is not None:
            self._step = step
        self.heartbeat()
        started, failure = time.monotonic(), None
        try:
            yield
        except BaseException as error:
            failure = type(error).__name__
            raise
        finally:
            self._phases.remove(name)
            seconds = time.monotonic() - started
            extra = {} if failure is None else {"error": failure}
            self.event(kinds.PHASE_END, step=step, phase=name, start_seq=start_seq, seconds=seconds, **extra)

    @contextmanager
    def busy(self, name: str) -> Iterator[None]:
        """Show `name` as the phase in the heartbeat: what a worker does inside a phase of the driver."""
        self._phases.append(name)
        self.heartbeat()
        try:
            yield
        finally:
            self._phases.remove(name)

    def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Append `samples` of `step`, one per line, to `samples/step-<step>.jsonl`."""
        lines = b"".join(encode_line({"attempt": self.attempt, "step": step, **sample}) for sample in samples)
        try:
            file = AppendFile(self.layout.samples(step))
            try:
                file.write(lines)
            finally:
                file.close()
        except OSError as error:
            self.lost += len(samples)
            self._report(error)

    def heartbeat(self) -> None:
        """Refresh the heartbeat file, at most once per interval."""
        self._pulse.beat()

    def close(self) -> None:
        """Stop the heartbeat and close the file. The last heartbeat stays, for the post-mortem."""
        self._pulse.stop()
        if self._stacks is not None:
            self._stacks.close()
        self._file.close()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer_with_stacks(self) -> StackFile | None:
        try:
            return StackFile(self.layout.stacks(self.writer))
        except OSError as error:
            self._report(error)
            return None

    def _state(self) -> dict[str, Any]:
        return {"phase": self._phases[-1] if self._phases else None, "step": self._step}

    def _emit(self, kind: str, body: dict[str, Any]) -> int:
        """Write one record; returns its sequence number."""
        if self.lost:
            gap = self._record(kinds.RECORD_GAP, {"lost": self.lost, "error": self._error})
            if self._write(gap):
                self.lost = 0
        record = self._record(kind, body)
        if not self._write(record):
            self.lost += 1
        if self.history is not None:
            self.history.ingest(record)
        return record["seq"]

    def _write(self, record: dict[str, Any]) -> bool:
        try:
            self._file.write(encode_line(record))
        except OSError as error:
            self._report(error)
            return False
        return True

    def _record(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        record = {
            "kind": kind,
            "writer": self.writer,
            "attempt": self.attempt,
            "seq": self._seq,
            "time": time.time(),
            **body,
        }
        self._seq += 1
        return record

    def _report(self, error: OSError) -> None:
        """Remember why writing failed; tell it once."""
        self._error = error.strerror or str(error)
        if not self._told:
            self._told = True
            print(
                f"miles: the run record cannot be written: {self._error}: {self.layout.root}\n"
                "  training goes on; lost lines are counted and the gap is recorded when writing works again",
                file=sys.stderr,
            )
