"""What a run has said so far, in memory: series, events and phases, without abandoned attempts.

A run resumed from the checkpoint of step S writes `resume` with that step, and whatever older attempts said
of later steps is no longer part of the run. The same class serves a reader of files and a running trainer.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from miles.record import events as kinds


@dataclass
class Series:
    """One metric: parallel arrays sorted by step, one point per step (the last one said wins)."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))
    attempts: array[int] = field(default_factory=lambda: array("q"))

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return zip(self.steps, self.values, strict=True)

    @property
    def last(self) -> float:
        return self.values[-1]

    def at(self, step: int) -> float | None:
        i = bisect_left(self.steps, step)
        return self.values[i] if i < len(self.steps) and self.steps[i] == step else None

    def put(self, step: int, value: float, attempt: int) -> None:
        i = len(self.steps) if not self.steps or step > self.steps[-1] else bisect_left(self.steps, step)
        if i < len(self.steps) and self.steps[i] == step:
            if attempt >= self.attempts[i]:
                self.values[i], self.attempts[i] = value, attempt
            return
        self.steps.insert(i, step)
        self.values.insert(i, value)
        self.attempts.insert(i, attempt)

    def drop(self, before_attempt: int, after_step: int) -> None:
        """Leave out the points of attempts before `before_attempt` at steps after `after_step`."""
        kept = [
            point
            for point in zip(self.steps, self.values, self.attempts, strict=True)
            if point[2] >= before_attempt or point[0] <= after_step
        ]
        if len(kept) < len(self.steps):
            self.steps = array("q", (p[0] for p in kept))
            self.values = array("d", (p[1] for p in kept))
            self.attempts = array("q", (p[2] for p in kept))

    def forget_before(self, step: int) -> None:
        """Leave out the points of steps before `step`."""
        i = bisect_left(self.steps, step)
        del self.steps[:i], self.values[:i], self.attempts[:i]


@dataclass
class Phase:
    """One stay in a phase of the loop. `seconds` is None while it is open; `start` is in epoch seconds."""

    name: str
    step: int | None
    writer: str
    attempt: int
    start: float
    seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Row:
    """All metrics of one step; `time`, `attempt` and `seq` are those of the line written last."""

    step: int
    time: float
    attempt: int
    seq: int
    metrics: dict[str, float]


class History:
    """The live part of everything recorded. Feed it records in the order each writer wrote them."""

    def __init__(self) -> None:
        self.series: dict[str, Series] = {}
        self.events_by_kind: dict[str, list[dict[str, Any]]] = {}
        """Events that are neither metrics nor phases, as they came in."""
        self.phases: list[Phase] = []
        self.attempt = 0
        """The highest attempt seen; 0 before the first record."""
        self.last_time = 0.0
        self.resumes: dict[int, int] = {}
        """The step each later attempt started from."""
        self._row_keys: dict[int, tuple[float, int, int]] = {}
        self._open: dict[tuple[str, int, int], Phase] = {}

    def is_live(self, attempt: int, step: int | None) -> bool:
        """Whether what `attempt` said of `step` still belongs to the run; without a step it always does."""
        if step is None or not self.resumes:
            return True
        return all(step <= resumed for later, resumed in self.resumes.items() if later > attempt)

    def ingest(self, record: dict[str, Any]) -> bool:
        """Take in one record; False when it belongs to an abandoned part of the run."""
        kind, attempt, step = record["kind"], record["attempt"], record.get("step")
        self.attempt = max(self.attempt, attempt)
        self.last_time = max(self.last_time, record["time"])
        if kind == kinds.RESUME:
            self._resume(attempt, record["step"])
        if kind == kinds.PHASE_END:
            return self._end_phase(record)
        if not self.is_live(attempt, step):
            return False
        if kind == kinds.METRICS:
            self._put_row(record)
        elif kind == kinds.PHASE_START:
            self._start_phase(record)
        else:
            self.events_by_kind.setdefault(kind, []).append(record)
        return True

    def rows(self) -> list[Row]:
        """One row per step that has metrics, in step order."""
        metrics: dict[int, dict[str, float]] = {step: {} for step in self._row_keys}
        for name, series in self.series.items():
            for step, value in series:
                metrics[step][name] = value
        return [Row(step, *self._row_keys[step], metrics[step]) for step in sorted(metrics)]

    def row(self, step: int) -> Row | None:
        if step not in self._row_keys:
            return None
        found = {name: series.at(step) for name, series in self.series.items()}
        return Row(step, *self._row_keys[step], {n: v for n, v in found.items() if v is not None})

    @property
    def last_step(self) -> int | None:
        """The latest step that has metrics."""
        return max((series.steps[-1] for series in self.series.values()), default=None)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind in order of time."""
        return sorted(self.events_by_kind.get(kind, ()), key=_time)

    def events(self) -> list[dict[str, Any]]:
        """Events of every kind in order of time."""
        return sorted((e for found in self.events_by_kind.values() for e in found), key=_time)

    def open_phases(self) -> list[Phase]:
        """Phases of the present attempt that have not ended, oldest first."""
        return [p for p in self._open.values() if p.attempt == self.attempt]

    def forget_before(self, step: int) -> None:
        """Let go of rows and closed phases of earlier steps: a bound on memory for who watches for weeks."""
        for series in self.series.values():
            series.forget_before(step)
        self.series = {name: series for name, series in self.series.items() if len(series)}
        self._row_keys = {s: k for s, k in self._row_keys.items() if s >= step}
        self.phases = [p for p in self.phases if p.seconds is None or p.step is None or p.step >= step]

    def _put_row(self, record: dict[str, Any]) -> None:
        step, attempt = record["step"], record["attempt"]
        for name, value in record["metrics"].items():
            series = self.series.get(name)
            if series is None:
                series = self.series[name] = Series()
            series.put(step, value, attempt)
        key = (record["time"], attempt, record["seq"])
        if step not in self._row_keys or attempt >= self._row_keys[step][1]:
            self._row_keys[step] = key

    def _start_phase(self, record: dict[str, Any]) -> None:
        phase = Phase(
            record["phase"], record.get("step"), record["writer"], record["attempt"], record["time"]
        )
        self.phases.append(phase)
        self._open[(record["writer"], record["attempt"], record["seq"])] = phase

    def _end_phase(self, record: dict[str, Any]) -> bool:
        phase = self._open.pop((record["writer"], record["attempt"], record["start_seq"]), None)
        if phase is None:
            return False
        phase.seconds, phase.error = record["seconds"], record.get("error")
        return True

    def _resume(self, attempt: int, step: int) -> None:
        self.resumes[attempt] = step
        for series in self.series.values():
            series.drop(attempt, step)
        self.series = {name: series for name, series in self.series.items() if len(series)}
        self._row_keys = {s: k for s, k in self._row_keys.items() if self.is_live(k[1], s)}
        for kind, found in self.events_by_kind.items():
            self.events_by_kind[kind] = [e for e in found if self.is_live(e["attempt"], e.get("step"))]
        self.phases = [p for p in self.phases if self.is_live(p.attempt, p.step)]
        self._open = {k: p for k, p in self._open.items() if self.is_live(p.attempt, p.step)}


def _time(event: dict[str, Any]) -> float:
    return event["time"]
