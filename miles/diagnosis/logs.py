"""Bare log files: tracebacks, telling lines, deaths of Ray actors, and the last words of each worker.

Nothing is known of such files but their names. A driver's log carries the lines of many workers; they are
taken apart by the prefix that Ray or torchrun puts before them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from miles.diagnosis.ray_text import DeadActor, dead_actors, plain_line, split_line
from miles.diagnosis.tracebacks import START, Failure, failure_in_text

SUFFIXES = frozenset({".log", ".out", ".err", ".txt", ".stderr", ".stdout"})
MAX_FILES = 2000
MAX_BYTES = 64 << 20
"""Of a longer file, this much of its beginning and of its end is read."""
TRACEBACK_LINES = 400
_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)")
_CREATION = "Exception raised in creation task"
_CHAINED = ("The above exception was the direct cause", "During handling of the above exception")


@dataclass(frozen=True)
class Line:
    """One line of a log without prefix and colour."""

    text: str
    worker: str
    log: str
    """File name and line number."""
    time: float


@dataclass
class LogScan:
    """What a set of logs tells."""

    files: list[Path] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    """In order of time."""
    deaths: list[DeadActor] = field(default_factory=list)
    telling: list[Line] = field(default_factory=list)
    """Lines that fit one of the patterns asked for, in order of time."""
    last_words: list[Line] = field(default_factory=list)


def find_logs(root: Path) -> list[Path]:
    """Log files in a directory and below, or the file itself."""
    if root.is_file():
        return [root]
    found = (path for path in sorted(root.rglob("*")) if path.suffix in SUFFIXES and path.is_file())
    return [path for path, _ in zip(found, range(MAX_FILES), strict=False)]


def scan_logs(files: Iterable[Path], patterns: Iterable[re.Pattern[str]] = ()) -> LogScan:
    """Read the files and sort what they tell by time (a line's own, else that of the file)."""
    scan = LogScan(list(files))
    wanted = re.compile("|".join(f"(?:{p.pattern})" for p in patterns) or r"(?!)", re.IGNORECASE)
    for path in scan.files:
        text = read_log(path)
        scan.deaths += [d for d in dead_actors(plain_line(text)) if d not in scan.deaths]
        streams = _streams(path, text)
        for lines in streams.values():
            scan.failures += _tracebacks(lines)
            scan.telling += [line for line in lines if wanted.search(line.text)]
            last = next((line for line in reversed(lines) if line.text.strip()), None)
            if last is not None:
                scan.last_words.append(last)
    scan.failures.sort(key=lambda failure: failure.time)
    scan.telling.sort(key=lambda line: line.time)
    return scan


def read_log(path: Path) -> str:
    """The text of a log, the middle of a very long one left out."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= 2 * MAX_BYTES:
            return file.read().decode("utf-8", "replace")
        head = file.read(MAX_BYTES)
        file.seek(size - MAX_BYTES)
        return (head + b"\n" + file.read()).decode("utf-8", "replace")


def _streams(path: Path, text: str) -> dict[str, list[Line]]:
    """Lines by worker. A line without a time has that of the line before it, else that of the file."""
    streams: dict[str, list[Line]] = {}
    modified = path.stat().st_mtime
    now: float | None = None
    for number, raw in enumerate(text.splitlines(), start=1):
        worker, line = split_line(plain_line(raw))
        now = _time_of(line) or now
        time = modified if now is None else min(now, modified)
        name = worker or path.name
        streams.setdefault(name, []).append(Line(line, name, f"{path.name}:{number}", time))
    return streams


def _time_of(line: str) -> float | None:
    match = _TIME.search(line[:80])
    if match is None:
        return None
    try:
        return datetime.fromisoformat(f"{match[1]}T{match[2]}").timestamp()
    except ValueError:
        return None


def _tracebacks(lines: list[Line]) -> Iterator[Failure]:
    at = 0
    while at < len(lines):
        if lines[at].text.strip() != START and _CREATION not in lines[at].text:
            at += 1
            continue
        end = _end_of_traceback(lines, at)
        text = "\n".join(line.text for line in lines[at:end])
        failure = failure_in_text(text, lines[at].worker, lines[at].time, lines[at].log)
        if failure is not None:
            yield failure
        at = end


def _end_of_traceback(lines: list[Line], start: int) -> int:
    """One past the last line of the traceback, chained ones included."""
    at = start + 1
    limit = min(len(lines), start + TRACEBACK_LINES)
    while at < limit:
        text = lines[at].text
        if text and not text[0].isspace() and text.strip() != START and "ray::" not in text:
            after = next((line.text for line in lines[at + 1 : at + 4] if line.text.strip()), "")
            if not after.startswith((*_CHAINED, START)) and not text.startswith(_CHAINED):
                return at + 1
        at += 1
    return limit
