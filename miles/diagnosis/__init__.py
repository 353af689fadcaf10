"""Symptom, evidence, cause, fix: rules over the run record."""

from miles.diagnosis.assess import assess
from miles.diagnosis.finding import Evidence, Finding, Fix, FixKind, Severity, Tier
from miles.diagnosis.monitor import Monitor, open_alerts
from miles.diagnosis.report import Report, diagnose
from miles.diagnosis.rule import Rule
from miles.diagnosis.rules import BY_ID, RULES
from miles.diagnosis.thresholds import Thresholds
from miles.diagnosis.view import RecordView

__all__ = [
    "BY_ID",
    "RULES",
    "Evidence",
    "Finding",
    "Fix",
    "FixKind",
    "Monitor",
    "RecordView",
    "Report",
    "Rule",
    "Severity",
    "Thresholds",
    "Tier",
    "assess",
    "diagnose",
    "open_alerts",
]
