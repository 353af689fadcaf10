"""How a run stands, told from its summary and its driver's heartbeat: never from a claim of its own."""

from __future__ import annotations

from enum import StrEnum

from miles.errors import RunError
from miles.record.heartbeat import read_heartbeats
from miles.record.json_file import read_json
from miles.record.layout import RunLayout


class RunStatus(StrEnum):
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"
    """Stopped on request, at a step boundary."""
    INTERRUPTED = "interrupted"
    """Ended by a signal."""
    DEAD = "dead"
    """The process is gone and left no summary: killed, out of memory, machine lost."""
    EMPTY = "empty"
    """The directory exists but no process has written to it yet."""

    @property
    def ended(self) -> bool:
        return self not in (RunStatus.RUNNING, RunStatus.EMPTY)


def run_status(layout: RunLayout) -> RunStatus:
    """The status of the latest attempt."""
    heartbeats = read_heartbeats(layout.heartbeat_dir)
    beat = heartbeats.get("driver") or max(heartbeats.values(), key=lambda b: b.attempt, default=None)
    # Asked before the summary is read: a process that is gone has written it by then, or never will.
    alive = beat is not None and beat.alive()
    summary = _summary_of(layout)
    if summary is not None and (beat is None or summary["attempt"] >= beat.attempt):
        return RunStatus(summary["status"])
    if beat is None:
        return RunStatus.EMPTY
    return RunStatus.RUNNING if alive else RunStatus.DEAD


def _summary_of(layout: RunLayout) -> dict | None:
    try:
        summary = read_json(layout.summary)
    except RunError:
        return None
    known = summary.get("status") in set(RunStatus)
    return summary if known and isinstance(summary.get("attempt"), int) else None
