"""What the dashboard knows of one run at one moment: immutable, so one thread makes it, another draws it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from miles.record.status import RunStatus
from miles_cli.dashboard.track import TrackView

SEVERITIES = ("critical", "warning", "info")
EMPTIED = "the run directory was taken away; this is what was read before"
GONE = "the process is gone: killed, out of memory, or its machine was lost"


@dataclass(frozen=True)
class OpenPhase:
    """A phase that has begun and not ended. `start` is in epoch seconds."""

    name: str
    step: int | None
    writer: str
    start: float


@dataclass(frozen=True)
class Alert:
    """One firing of a rule, from its raising to its clearing. `record` is the event as it was written."""

    rule: str
    severity: str
    title: str
    step: int | None
    time: float
    record: Mapping[str, Any]
    cleared_step: int | None = None
    cleared: bool = False


@dataclass(frozen=True)
class Worker:
    """A process of the run, by its last heartbeat. `time` is when it wrote it."""

    writer: str
    phase: str | None
    step: int | None
    time: float
    alive: bool


@dataclass(frozen=True)
class LogLine:
    """One event in words."""

    time: float
    step: int | None
    writer: str
    level: str
    text: str


@dataclass(frozen=True)
class RunSnapshot:
    """One run. `version` rises whenever anything in it changed."""

    run_id: str
    path: str
    name: str
    profile: str
    status: RunStatus
    attempt: int
    step: int | None
    total: int | None
    version: int
    first_time: float
    last_time: float
    """Time of the last event, epoch seconds; 0 when there is none."""
    tracks: Mapping[str, TrackView] = field(default_factory=dict)
    open_phases: tuple[OpenPhase, ...] = ()
    medians: Mapping[str, float] = field(default_factory=dict)
    """Median seconds by phase, over the recent closed ones."""
    phase_totals: Mapping[str, float] = field(default_factory=dict)
    """Seconds by phase, summed over the recent closed ones."""
    step_seconds: float | None = None
    """Median time between steps."""
    alerts: tuple[Alert, ...] = ()
    log: tuple[LogLine, ...] = ()
    controls: tuple[Mapping[str, Any], ...] = ()
    """The latest requests that the run has answered, as recorded."""
    numerics: Mapping[str, Any] | None = None
    """Which exact numerics were found, as recorded."""
    workers: tuple[Worker, ...] = ()
    resumes: Mapping[int, int] = field(default_factory=dict)
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Resolved values by section."""
    loading: float | None = None
    """Fraction of a large record that has been read; None when all of it has."""

    @cached_property
    def open_alerts(self) -> tuple[Alert, ...]:
        """Alerts not cleared, worst and newest first."""
        found = [a for a in self.alerts if not a.cleared]
        return tuple(sorted(found, key=lambda a: (severity_rank(a.severity), -a.time)))

    @property
    def cause_of_death(self) -> str | None:
        """What ended a run that failed, or whose process or directory is gone; None for every other run."""
        if self.status is RunStatus.FAILED:
            told = (line.text for line in reversed(self.log) if line.level == "critical")
            return next(told, "failed without a word")
        if self.status is RunStatus.EMPTY and self.last_time:
            return EMPTIED
        return GONE if self.status is RunStatus.DEAD else None

    def alert_counts(self) -> dict[str, int]:
        return {s: sum(1 for a in self.open_alerts if a.severity == s) for s in SEVERITIES}

    @cached_property
    def first_step(self) -> int:
        return min((t.first_step for t in self.tracks.values()), default=0)

    @property
    def eta(self) -> float | None:
        """Seconds to the last step, None when that cannot be told."""
        if self.total is None or self.step is None or self.step_seconds is None or self.status.ended:
            return None
        return max(0, self.total - self.step) * self.step_seconds

    @property
    def last_step(self) -> int:
        return max((t.last_step for t in self.tracks.values()), default=0)


def severity_rank(severity: str) -> int:
    return SEVERITIES.index(severity) if severity in SEVERITIES else len(SEVERITIES)
