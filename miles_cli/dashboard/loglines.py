"""Events in words, for the log pane."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles.record import events as kinds
from miles.record.events import RESERVED
from miles_cli.dashboard.numbers import duration
from miles_cli.dashboard.snapshot import LogLine

_LEVELS = {
    kinds.EXCEPTION: "critical",
    kinds.WORKER_DEAD: "critical",
    kinds.NODE_LOST: "critical",
    kinds.RESTART_FAILED: "warning",
    kinds.RESUMED_BETWEEN_UPDATES: "warning",
    kinds.NON_FINITE: "critical",
    kinds.ROUTES_MISSING: "warning",
    kinds.BAD_ROW: "warning",
    kinds.RECORD_GAP: "warning",
    kinds.RECORD_REPAIRED: "warning",
}
NUMERICS_FIELDS = ("numerics", "rows", "experts", "attention")
_SLOW = 2.0
"""A phase this many times slower than its median is told."""


def log_line(record: dict[str, Any], medians: dict[str, float]) -> LogLine | None:
    """The event as a line, None for what the log leaves out (metrics, ordinary phases)."""
    kind = record["kind"]
    if kind in (kinds.METRICS, kinds.PHASE_START):
        return None
    if kind == kinds.PHASE_END:
        text = _phase(record, medians)
        return _line(record, "warning" if "error" in record else "info", text) if text else None
    level = record["severity"] if kind == kinds.ALERT else _LEVELS.get(kind, "info")
    if kind == kinds.ALERT and record["state"] == "cleared":
        level = "info"
    return _line(record, level, _text(kind, record))


def _line(record: dict[str, Any], level: str, text: str) -> LogLine:
    return LogLine(record["time"], record.get("step"), record["writer"], level, text)


def _phase(record: dict[str, Any], medians: dict[str, float]) -> str | None:
    name, seconds = record["phase"], record["seconds"]
    if "error" in record:
        return f"{name} ended by {record['error']} after {duration(seconds)}"
    usual = medians.get(name)
    if usual is None or seconds < _SLOW * usual or seconds < 0.5:
        return None
    return f"{name} took {duration(seconds)}, usually {duration(usual)}"


def _start(record: dict[str, Any]) -> str:
    changes = "".join(
        f", {key} {before} -> {after}" for key, (before, after) in record.get("changes", {}).items()
    )
    parent = f", copied from {record['parent']}" if "parent" in record else ""
    return f"attempt {record['attempt']} started by {record.get('by', 'cli')}{changes}{parent}"


def numerics_text(record: Mapping[str, Any]) -> str:
    """Which numerics were found on the machine."""
    found = [f"{key}: {record[key]}" for key in NUMERICS_FIELDS[1:] if key in record]
    return f"{record['numerics']} numerics: {'; '.join(found)}"


def _text(kind: str, record: dict[str, Any]) -> str:
    if kind == kinds.ALERT:
        return f"{record['rule']} {record['state']}: {record['title']}"
    if kind == kinds.EXCEPTION:
        return f"{record['type']} in {record['worker']}: {record['message']}"
    if kind == kinds.WORKER_DEAD:
        return f"worker {record['worker']} died: {record['reason']}"
    if kind == kinds.NUMERICS:
        return numerics_text(record)
    if kind == kinds.NODE_LOST:
        return f"node {record['address']} left with {', '.join(record['workers'])}"
    if kind == kinds.CHECKPOINT:
        return f"checkpoint {record['path']}"
    if kind == kinds.RESUME:
        return f"attempt {record['attempt']} resumed from step {record['step']}"
    if kind == kinds.NON_FINITE:
        return f"non-finite {record['what']} in {record['tensor']} ({record['count']} elements)"
    if kind == kinds.CONTROL:
        patch = ", ".join(f"{key} = {value}" for key, value in record.get("patch", {}).items())
        asked = f"{record['action']} {patch}" if patch else record["action"]
        return f"request {asked} by {record.get('by', '?')}: {record['state']}"
    if kind == kinds.RUN_START:
        return _start(record)
    if kind == kinds.RUN_END:
        return (
            f"{record['status']} after {duration(record['seconds'])}"
            if "seconds" in record
            else record["status"]
        )
    if kind == kinds.BAD_ROW:
        return f"row left out: {record['file']}:{record['line']}: {record['reason']}"
    told = ", ".join(f"{k} {v}" for k, v in record.items() if k not in RESERVED and k != "step")
    words = kind.replace("_", " ")
    return f"{words}: {told}" if told else words
