"""The ends of the workers' log files, to be merged with the events by time."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

from miles.record.layout import RunLayout
from miles_cli.dashboard.snapshot import LogLine

TAIL_BYTES = 64 << 10
_STAMP = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)")
_LEVEL = re.compile(r"\b(ERROR|CRITICAL|FATAL|Traceback|WARNING|WARN)\b")


def read_tails(run_dir: str | Path) -> list[LogLine]:
    """The last lines of each file in logs/. A line without a time stamp belongs to the one before it."""
    lines: list[LogLine] = []
    for path in sorted(p for p in RunLayout(run_dir).logs_dir.glob("*") if p.is_file()):
        lines += _tail(path)
    return lines


def _tail(path: Path) -> list[LogLine]:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        text = file.read().decode("utf-8", "replace")
    rows = text.splitlines()[1:] if size > TAIL_BYTES else text.splitlines()
    stamp = path.stat().st_mtime
    found = next((s for row in rows if (s := _stamp(row)) is not None), None)
    stamp = stamp if found is None else found
    lines = []
    for row in rows:
        stamp = _stamp(row) or stamp
        lines.append(LogLine(stamp, None, path.stem, _level(row), f"{path.name}: {row}"))
    return lines


def _stamp(row: str) -> float | None:
    found = _STAMP.search(row[:40])
    return datetime.fromisoformat(f"{found[1]}T{found[2]}").timestamp() if found else None


def _level(row: str) -> str:
    found = _LEVEL.search(row)
    if found is None:
        return "info"
    return "warning" if found[1].startswith("WARN") else "critical"
