"""From a run directory to snapshots, in bounded memory; runs in a thread of its own and touches no widget.

A large record is first skimmed, so that its whole course is on the screen at once, then read piece by piece
while the skimmed outline keeps following the live end.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from miles.record import RunReader
from miles.record import events as kinds
from miles.record.history import History, Phase, Series
from miles.record.layout import RunLayout
from miles_cli.dashboard.loglines import log_line
from miles_cli.dashboard.snapshot import Alert, LogLine, OpenPhase, RunSnapshot, Worker
from miles_cli.dashboard.track import EXACT, Track, TrackView

SKIM_FROM = 4 << 20
"""A record larger than this is shown as an outline while it is read."""
PIECE = 2 << 20
LOG_LINES = 2_000
RECENT_PHASES = 240
RECENT_CONTROLS = 50


class RunFeed:
    """Follows one run. Call `advance()` now and then; `snapshot()` tells what is known.

    Raises RunError when `run_dir` is not a run directory.
    """

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.time) -> None:
        self.run_dir, self._clock = run_dir, clock
        self._reading = _Intake(RunReader(run_dir, read=False))
        self._outline: _Intake | None = None
        self._size = self._reading.reader.unread_bytes
        self._version = 0
        self._about = _About(self._reading.reader)
        self._status = self._reading.reader.status()
        if self._size > SKIM_FROM:
            outline = RunReader(run_dir, read=False)
            outline.skim()
            self._outline = _Intake(outline)
        else:
            self.advance()

    @property
    def loading(self) -> bool:
        return self._outline is not None

    @property
    def reader(self) -> RunReader:
        """The most complete reader there is now."""
        return (self._outline or self._reading).reader

    def advance(self) -> bool:
        """Read what is new, or the next piece of a large record; whether anything was."""
        # The status first: what an ended run has written is read after it.
        self._status = self._reading.reader.status()
        changed = self._reading.read(PIECE if self._outline else None)
        if self._outline is not None:
            self._outline.read(None)
            if not self._reading.reader.unread_bytes:
                self._outline = None
            changed = True
        self._version += changed
        return changed

    def snapshot(self) -> RunSnapshot:
        shown = self._outline or self._reading
        self._about.refresh(shown.reader.attempt)
        history = shown.reader.history
        recent = history.phases[-RECENT_PHASES:]
        step = history.last_step
        return RunSnapshot(
            run_id=shown.reader.run_id,
            path=str(self.run_dir),
            name=self._about.name,
            profile=self._about.profile,
            status=self._status,
            attempt=history.attempt,
            step=step,
            total=self._about.total,
            version=self._version,
            first_time=shown.first_time,
            last_time=history.last_time,
            tracks=shown.views(),
            open_phases=tuple(OpenPhase(p.name, p.step, p.writer, p.start) for p in history.open_phases()),
            medians=phase_medians(recent),
            phase_totals=_totals(recent),
            step_seconds=_step_seconds(history, recent),
            alerts=shown.alerts(),
            log=tuple(shown.log),
            controls=tuple(history.of_kind(kinds.CONTROL)[-RECENT_CONTROLS:]),
            numerics=next(reversed(history.of_kind(kinds.NUMERICS)), None),
            workers=self._workers(shown.reader),
            resumes=dict(history.resumes),
            config=self._about.config,
            loading=self._fraction() if self._outline else None,
        )

    def _fraction(self) -> float:
        return 1.0 - self._reading.reader.unread_bytes / max(1, self._size)

    def _workers(self, reader: RunReader) -> tuple[Worker, ...]:
        beats = reader.heartbeats().values()
        now = self._clock()
        return tuple(Worker(b.writer, b.phase, b.step, b.time, b.alive(now)) for b in beats)


class _About:
    """What config.json and meta.json say, read again until they are there and for every attempt."""

    def __init__(self, reader: RunReader) -> None:
        self._reader = reader
        self.name, self.profile = reader.run_id, ""
        self.total: int | None = None
        self.config: dict[str, Any] = {}
        self._attempt = 0
        self.refresh(0)

    def refresh(self, attempt: int) -> None:
        if self.config and attempt == self._attempt:
            return
        self._attempt = attempt
        meta, self.config = self._reader.meta, self._reader.config
        self.name = meta.get("name") or self.config.get("run", {}).get("name") or self._reader.run_id
        self.profile = str(meta.get("profile") or "")
        total = meta.get("total_steps") or self.config.get("rollout", {}).get("num_rollout")
        self.total = total if isinstance(total, int) else None


class _Intake:
    """A reader with its bounded copies: tracks, alerts and log."""

    def __init__(self, reader: RunReader) -> None:
        self.reader = reader
        self.log: deque[LogLine] = deque(maxlen=LOG_LINES)
        self.first_time = 0.0
        self._tracks: dict[str, Track] = {}
        self._resumes: dict[int, int] = {}
        self._alert_events = -1
        self._alerts: tuple[Alert, ...] = ()
        self._medians: dict[str, float] = {}
        self._take_log(reader.events()[-LOG_LINES:])
        self._sync()

    def read(self, max_bytes: int | None) -> bool:
        records = self.reader.poll(max_bytes)
        if not records:
            return False
        self.first_time = self.first_time or records[0]["time"]
        self._medians = phase_medians(self.reader.history.phases[-RECENT_PHASES:])
        self._take_log(records)
        self._sync()
        return True

    def views(self) -> dict[str, TrackView]:
        return {name: track.view() for name, track in self._tracks.items() if track.last_step is not None}

    def alerts(self) -> tuple[Alert, ...]:
        found = self.reader.history.events_by_kind.get(kinds.ALERT, [])
        if len(found) != self._alert_events:
            self._alert_events, self._alerts = len(found), pair_alerts(self.reader.alerts())
        return self._alerts

    def _take_log(self, records: list[dict[str, Any]]) -> None:
        lines = (log_line(record, self._medians) for record in records[-20 * LOG_LINES :])
        self.log.extend(line for line in lines if line is not None)

    def _sync(self) -> None:
        """Carry new points into the tracks and let the reader forget what they hold."""
        history = self.reader.history
        if history.resumes != self._resumes:
            fresh = [step for attempt, step in history.resumes.items() if attempt not in self._resumes]
            self._resumes = dict(history.resumes)
            for track in self._tracks.values():
                track.truncate(min(fresh))
        for name, series in history.series.items():
            _follow(self._tracks.setdefault(name, Track()), series)
        longest = max(history.series.values(), key=len, default=None)
        if longest is not None and len(longest) > 3 * EXACT:
            history.forget_before(longest.steps[-EXACT])


def _follow(track: Track, series: Series) -> None:
    known = track.last_step
    if known is not None and series.steps and series.steps[-1] <= known:
        return
    begin = 0 if known is None else bisect_right(series.steps, known)
    track.extend(np.array(series.steps[begin:]), np.array(series.values[begin:]))


def pair_alerts(events: list[dict[str, Any]]) -> tuple[Alert, ...]:
    """Raised and cleared events of each rule as one alert per firing, in order of time.

    A rule that is raised again while it is open has become worse: the newer evidence replaces the older.
    """
    found: list[Alert] = []
    open_at: dict[str, int] = {}
    for event in events:
        rule = event["rule"]
        if event["state"] == "raised":
            at = open_at.setdefault(rule, len(found))
            since = found[at].step if at < len(found) else event.get("step")
            found[at:] = [
                Alert(rule, event["severity"], event["title"], since, event["time"], event),
                *found[at + 1 :],
            ]
        elif rule in open_at:
            at = open_at.pop(rule)
            found[at] = replace(found[at], cleared=True, cleared_step=event.get("step"))
    return tuple(found)


def phase_medians(phases: list[Phase]) -> dict[str, float]:
    seconds: dict[str, list[float]] = {}
    for phase in phases:
        if phase.seconds is not None and phase.error is None:
            seconds.setdefault(phase.name, []).append(phase.seconds)
    return {name: median(values) for name, values in seconds.items()}


def _totals(phases: list[Phase]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for phase in phases:
        if phase.seconds is not None:
            totals[phase.name] = totals.get(phase.name, 0.0) + phase.seconds
    return totals


def _step_seconds(history: History, phases: list[Phase]) -> float | None:
    """Median seconds per step: between the starts of the phase that opens each step."""
    timed = history.series.get("perf/step_time")
    if timed is not None and len(timed):
        return median(timed.values[-50:])
    starts: dict[int, float] = {}
    for phase in phases:
        if phase.step is not None:
            starts.setdefault(phase.step, phase.start)
    ordered = [starts[step] for step in sorted(starts)]
    gaps = [b - a for a, b in pairwise(ordered) if b > a]
    return median(gaps) if gaps else None


def sample_steps(run_dir: str | Path) -> list[int]:
    """Steps that have a sample file, without opening any."""
    found = RunLayout(run_dir).samples_dir.glob("step-*.jsonl")
    return sorted(int(path.stem.removeprefix("step-")) for path in found)
