"""The root of a failure: the first real exception or telling line across all workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from miles.diagnosis.known_texts import ECHOES, KNOWN_TEXTS, KnownText, known_text
from miles.diagnosis.logs import Line, LogScan, scan_logs
from miles.diagnosis.tracebacks import Failure, failure_of, first_real
from miles.record import RunStatus
from miles.record import events as kinds

if TYPE_CHECKING:
    from miles.diagnosis.view import RecordView

_PATTERNS = tuple(known.pattern for known in KNOWN_TEXTS if not known.exception_only)


@dataclass(frozen=True)
class Root:
    """Where it began: an exception, or a line of a log, and the known text that it fits."""

    failure: Failure | None
    line: Line | None
    known: KnownText | None
    others: tuple[Failure, ...] = ()


def find_root(view: RecordView) -> Root | None:
    """A real exception first, then a telling line, then an exception that is only an echo."""
    failures = _failures(view)
    failure = first_real(failures)
    if failure is not None and not failure.is_consequence:
        return _of_failure(failure, failures)
    lines = [(line, known) for line in view.logs.telling if (known := known_text(line.text)) is not None]
    lines.sort(key=lambda found: (found[1].rule in ECHOES, found[0].time))
    if lines:
        return Root(failure, *lines[0], tuple(failures))
    return None if failure is None else _of_failure(failure, failures)


def scan(view: RecordView) -> LogScan:
    """The logs of the present attempt. A run that finished well is not searched for trouble."""
    if view.status is RunStatus.FINISHED or not view.log_files:
        return LogScan()
    start = _attempt_start(view)
    return scan_logs([path for path in view.log_files if path.stat().st_mtime >= start], _PATTERNS)


def _of_failure(failure: Failure, failures: list[Failure]) -> Root:
    others = tuple(f for f in failures if f is not failure)
    return Root(failure, None, known_text(f"{failure.type}: {failure.message}\n{failure.text}"), others)


def _failures(view: RecordView) -> list[Failure]:
    """Exceptions of the present attempt in order of time; logs are asked only when no event tells."""
    attempt = view.history.attempt
    events = [e for e in view.events(kinds.EXCEPTION) if e["attempt"] == attempt]
    return [failure_of(event) for event in events] if events else view.logs.failures


def _attempt_start(view: RecordView) -> float:
    attempt = view.history.attempt
    times = [e["time"] for e in view.history.events() if e["attempt"] == attempt]
    times += [p.start for p in view.history.phases if p.attempt == attempt]
    return min(times, default=0.0)
