"""Is the run alive, and if not, where did it stop?"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from miles.diagnosis.finding import Evidence, Fix, FixKind, Match, Severity, Tier
from miles.diagnosis.rule import rule
from miles.diagnosis.view import RecordView
from miles.record import Phase, RunStatus
from miles.record import events as kinds

WEIGHT_SYNC = "update_weights"
RESUME = Fix(
    "resume from the latest checkpoint",
    FixKind.RESUME,
    "steps since that checkpoint are computed again",
)
START_OVER = Fix(
    "start again: no checkpoint was written",
    FixKind.MANUAL,
    "all steps are computed again; set checkpoint.save_interval to lose less next time",
    start_over=True,
)
_LOOK = Fix("see where it hangs: miles diagnose --stacks dumps every worker's stack", FixKind.MANUAL, "none")


def way_back(view: RecordView) -> tuple[Fix, ...]:
    """Resuming, or starting again where there is nothing to resume from; nothing for other systems' runs."""
    if view.foreign:
        return ()
    return (RESUME,) if view.checkpoint_before(view.step) is not None else (START_OVER,)


@rule(
    "LV1",
    "The run is dead",
    tier=Tier.LIVENESS,
    severity=Severity.CRITICAL,
    symptom="no summary was written and the process of the heartbeat is gone (another machine: "
    "heartbeat too old)",
    cause="the process was ended from outside and could not say a word: kill -9, the out-of-memory "
    "killer, a lost "
    "machine or a closed job",
    remedy="look at `dmesg` or the scheduler for the reason, then resume from the latest checkpoint",
    source="miles",
)
def dead(view: RecordView) -> Match | None:
    if view.status is not RunStatus.DEAD:
        return None
    evidence = [
        Evidence(
            f"{name}: process {beat.pid} on {beat.host} is gone; its last heartbeat was "
            f"{_ago(view.now - beat.time)} ago, at step {beat.step}"
        )
        for name, beat in view.heartbeats.items()
    ]
    evidence += [Evidence(f"phase still open: {_describe(phase)}") for phase in view.history.open_phases()]
    return Match(view.step, tuple(evidence), way_back(view))


@rule(
    "LV2",
    "The run has fallen silent",
    tier=Tier.LIVENESS,
    severity=Severity.CRITICAL,
    symptom="the process exists, but its heartbeat is more than twelve intervals old",
    cause="the process is stopped, or the file system that holds the run directory hangs",
    remedy="look at the process (ps, py-spy dump); continue it, or kill it and resume",
    source="miles",
    thresholds=("heartbeat_stale_intervals", "heartbeat_stale_floor"),
)
def silent(view: RecordView) -> Match | None:
    if view.status is not RunStatus.RUNNING:
        return None
    limits = view.thresholds
    evidence = tuple(
        Evidence(f"{name}: process {beat.pid} last gave a sign {_ago(view.now - beat.time)} ago")
        for name, beat in view.heartbeats.items()
        if beat.attempt == view.history.attempt
        and view.now - beat.time
        > max(limits.heartbeat_stale_floor, limits.heartbeat_stale_intervals * beat.interval)
    )
    return Match(view.step, evidence, (_LOOK, *way_back(view))) if evidence else None


@rule(
    "LV3",
    "A worker died",
    tier=Tier.LIVENESS,
    severity=Severity.CRITICAL,
    symptom="an event says that a worker is gone, or Ray reports in a log that an actor died",
    cause="the worker process ended: see its exit code or signal, and its log",
    remedy="read the worker's log in logs/; the first real exception is named by EX1",
    source="miles",
)
def worker_died(view: RecordView) -> Match | None:
    deaths = [e for e in view.events(kinds.WORKER_DEAD) if e["attempt"] == view.history.attempt]
    told = [f"{e['worker']}: {e['reason']}" for e in deaths]
    told += [f"{actor.name}: {actor.reason}" for actor in view.logs.deaths]
    failed = [e for e in view.events(kinds.RESTART_FAILED) if e["attempt"] == view.history.attempt]
    told += [f"{e['worker']} was not started again: {e['reason']}" for e in failed if told]
    if not told:
        return None
    evidence = tuple(Evidence(text) for text in told[:8])
    step = deaths[0].get("step") if deaths else None
    look = Fix(
        "read the worker's own log; a connection error without one is often the out-of-memory killer (dmesg)",
        FixKind.MANUAL,
        "none",
    )
    severity = Severity.WARNING if _all_replaced(view, deaths) else _after_the_fact(view)
    return Match(step, evidence, (look, *way_back(view)), severity=severity)


def _all_replaced(view: RecordView, deaths: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the run itself put another worker in the place of each one that died."""
    restarts = Counter(e["worker"] for e in view.events(kinds.RESTART))
    told = Counter(e["worker"] for e in deaths)
    return bool(told) and not view.logs.deaths and told <= restarts


_STALL_THRESHOLDS = (
    "stall_median_factor",
    "stall_min_closed",
    "stall_step_factor",
    "stall_floor",
    "stall_ceiling",
)


@rule(
    "SY1",
    "A phase does not end",
    tier=Tier.LIVENESS,
    severity=Severity.CRITICAL,
    symptom="a phase is open for more than six times its median duration, and longer than twenty median "
    "steps (between 30 s and 30 min)",
    cause="a hang: a collective that one rank never entered, an engine that does not answer, a reward "
    "service that waits",
    remedy="the stacks of all processes show who waits for whom; the NCCL flight recorder for a collective",
    source="miles advisory.py (6 x median, 1800 s); floor scaled to the run's own step time",
    thresholds=_STALL_THRESHOLDS,
)
def stalled(view: RecordView) -> Match | None:
    return _stall(view, lambda phase: not phase.name.startswith(WEIGHT_SYNC))


@rule(
    "SY2",
    "The weight sync hangs",
    tier=Tier.LIVENESS,
    severity=Severity.CRITICAL,
    symptom="update_weights is open for more than six times its median duration, and longer than twenty "
    "median steps (between 30 s and 30 min)",
    cause="trainer ranks and engines wait for each other: a rank gathers in another order, or an engine "
    "left the group",
    remedy="dump all stacks; NCCL_DEBUG=INFO; check the order in which ranks gather; raise the timeout only "
    "where the transfer is merely slow",
    source="M#574 (74 steps, then silence for hours); slime debug.md",
    thresholds=_STALL_THRESHOLDS,
)
def weight_sync_stalled(view: RecordView) -> Match | None:
    return _stall(view, lambda phase: phase.name.startswith(WEIGHT_SYNC))


def _stall(view: RecordView, concerns: Callable[[Phase], bool]) -> Match | None:
    if view.status is not RunStatus.RUNNING:
        return None
    for phase in filter(concerns, view.history.open_phases()):
        limit = _stall_limit(view, phase.name)
        open_for = view.now - phase.start
        if limit is not None and open_for > limit:
            text = f"{_describe(phase)} has lasted {_ago(open_for)}; expected below {_ago(limit)}"
            return Match(phase.step, (Evidence(text),), (_LOOK, *way_back(view)))
    return None


def _stall_limit(view: RecordView, name: str) -> float | None:
    """Seconds after which a phase of this name counts as hanging, None while too few have closed."""
    limits = view.thresholds
    recent = (p for p in reversed(view.history.phases) if p.name == name and p.seconds is not None)
    closed = [p.seconds for p, _ in zip(recent, range(50), strict=False) if p.seconds is not None]
    if len(closed) < limits.stall_min_closed:
        return None
    steps = view.tail("perf/step_time", 50)
    allowance = limits.stall_step_factor * statistics.median(steps) if steps else limits.stall_ceiling
    floor = min(limits.stall_ceiling, max(limits.stall_floor, allowance))
    return max(limits.stall_median_factor * statistics.median(closed), floor)


def _after_the_fact(view: RecordView) -> Severity:
    """What a run survived is a warning."""
    return Severity.WARNING if view.status is RunStatus.FINISHED else Severity.CRITICAL


def _describe(phase: Phase) -> str:
    where = f" of step {phase.step}" if phase.step is not None else ""
    return f"{phase.name}{where} ({phase.writer})"


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


RULES = (dead, silent, worker_died, stalled, weight_sync_stalled)
