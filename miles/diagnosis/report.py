"""The post-mortem of whatever is there: what is wrong, and which alarms came and went on the way."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from miles.diagnosis.assess import assess
from miles.diagnosis.finding import Finding, Severity
from miles.diagnosis.logs import Line
from miles.diagnosis.rules import RULES
from miles.diagnosis.stacks import WorkerStack, dump_stacks
from miles.diagnosis.thresholds import DEFAULT, Thresholds
from miles.diagnosis.view import RecordView
from miles.errors import ExitCode
from miles.record import History, Phase, RunReader, RunStatus

HANGS = frozenset({"SY1", "SY2", "LV2"})
"""Findings that the stacks of the workers explain."""


@dataclass(frozen=True)
class PastAlert:
    """An alarm that the running trainer raised and that is over."""

    rule: str
    title: str
    severity: str
    raised: int | None
    cleared: int | None


@dataclass(frozen=True)
class Report:
    """Everything `miles diagnose` says."""

    run_id: str
    source: str
    """What was read: the run record, the event files of another system, logs."""
    status: RunStatus | None
    """None: nobody can tell."""
    step: int
    findings: tuple[Finding, ...]
    past: tuple[PastAlert, ...]
    config: dict[str, Any]
    bad_lines: int = 0
    last_phase: str | None = None
    last_words: tuple[Line, ...] = ()
    """The last line of each log, where logs are all there is."""
    without_data: tuple[str, ...] = ()
    """Rules that found none of the metrics they read."""
    notes: tuple[str, ...] = ()
    """What the reader should know of how the data was read."""
    stacks: tuple[WorkerStack, ...] = field(default=())

    @property
    def exit_code(self) -> ExitCode:
        critical = any(finding.severity is Severity.CRITICAL for finding in self.findings)
        return ExitCode.CRITICAL if critical else ExitCode.OK

    @property
    def evaluated(self) -> int:
        """Rules that had something to judge by."""
        return len(RULES) - len(self.without_data)


def diagnose(reader: RunReader, thresholds: Thresholds = DEFAULT, stacks: bool = False) -> Report:
    """Assess the whole record of a run, dead or alive.

    With `stacks`, or when a phase hangs, the stack of every live worker on this machine is dumped.
    """
    view = RecordView.of_run(reader, thresholds)
    report = report_of(view, reader.run_id, "run record", bad_lines=reader.bad_lines)
    present = {finding.rule for finding in report.findings}
    past = tuple(past for past in past_alerts(reader.history) if past.rule not in present)
    report = replace(report, past=past, config=reader.config, last_phase=last_phase(reader.history))
    if view.is_live and (stacks or present & HANGS):
        return replace(report, stacks=tuple(dump_stacks(reader.layout, view.heartbeats)))
    return report


def report_of(view: RecordView, name: str, source: str, **more: Any) -> Report:
    """What the rules say of a view; `more` are further fields of the report."""
    return Report(
        run_id=name,
        source=source,
        status=view.status,
        step=view.step,
        findings=tuple(assess(view)),
        without_data=tuple(rules_without_data(view)),
        **{"past": (), "config": {}, **more},
    )


def rules_without_data(view: RecordView) -> list[str]:
    """Ids of the rules of which every metric they look at is absent."""
    known = set(view.history.series)
    missing = []
    for rule in RULES:
        view.asked.clear()
        if rule.check(view) is None and view.asked and not view.asked & known:
            missing.append(rule.id)
    return missing


def last_phase(history: History) -> str | None:
    """The phase that is open, else the one that was entered last."""
    phases = history.open_phases() or history.phases
    if not phases:
        return None
    latest = max(phases, key=lambda phase: phase.start)
    return f"{_where(latest)}, {'still open' if latest.seconds is None else f'took {latest.seconds:.3g} s'}"


def _where(phase: Phase) -> str:
    step = "" if phase.step is None else f" of step {phase.step}"
    return f"{phase.name}{step} ({phase.writer})"


def past_alerts(history: History) -> list[PastAlert]:
    """Alarms that were raised and cleared, in the order of clearing."""
    raised: dict[str, dict[str, Any]] = {}
    past = []
    for alert in history.of_kind("alert"):
        if alert["state"] == "raised":
            raised.setdefault(alert["rule"], alert)
        elif (first := raised.pop(alert["rule"], None)) is not None:
            past.append(
                PastAlert(
                    first["rule"], first["title"], first["severity"], first.get("step"), alert.get("step")
                )
            )
    return past
