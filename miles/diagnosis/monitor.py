"""Diagnosis inside a running trainer: an alert when a rule starts to fire, another when it stops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles.diagnosis.assess import assess
from miles.diagnosis.finding import Finding, Severity
from miles.diagnosis.thresholds import DEFAULT, Thresholds
from miles.diagnosis.view import RecordView
from miles.record import History, RecordWriter


def open_alerts(history: History) -> dict[str, dict[str, Any]]:
    """The alerts that were raised and not cleared since, by rule id."""
    latest = {alert["rule"]: alert for alert in history.of_kind("alert")}
    return {rule: alert for rule, alert in latest.items() if alert["state"] == "raised"}


class Monitor:
    """Assesses `writer.history` at step boundaries and records what changed as alerts."""

    def __init__(
        self, writer: RecordWriter, config: Mapping[str, Any], thresholds: Thresholds = DEFAULT
    ) -> None:
        assert writer.history is not None, "a monitored writer keeps its history"
        self._writer, self._history = writer, writer.history
        self._config, self._thresholds = config, thresholds
        # An alarm of the attempt before a resume is still open until its signature is seen to be gone.
        self._open = {rule: Severity(alert["severity"]) for rule, alert in open_alerts(self._history).items()}

    def check(self, step: int) -> list[Finding]:
        """Assess the run after `step`; returns the findings that are new or have become worse."""
        found = assess(RecordView(self._history, self._config, thresholds=self._thresholds))
        worse = [f for f in found if f.rule not in self._open or f.severity.rank < self._open[f.rule].rank]
        for finding in worse:
            details = finding.as_dict()
            self._writer.alert(
                rule=finding.rule,
                severity=finding.severity.value,
                title=finding.title,
                step=step,
                cause=finding.cause,
                since=finding.step,
                evidence=details["evidence"],
                fixes=details["fixes"],
            )
        present = {finding.rule: finding.severity for finding in found}
        for rule in self._open.keys() - present.keys():
            severity = self._open[rule]
            self._writer.alert(
                rule=rule, severity=severity.value, title="cleared", step=step, state="cleared"
            )
        self._open = present
        return worse
