"""What users of slime, miles and their neighbours ran into, and what answers each report here."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("field_reports.toml")


@dataclass(frozen=True)
class FieldReport:
    """One report. `rules` are preflight's; a report without one is answered elsewhere, as `answer` says."""

    topic: str
    thread: str
    """`slime#1059`, or the name of a document."""
    complaint: str
    rules: tuple[str, ...]
    answer: str


@cache
def field_reports() -> tuple[FieldReport, ...]:
    """Every report, by topic."""
    rows = tomllib.loads(TABLE.read_text(encoding="utf-8"))["report"]
    return tuple(
        FieldReport(row["topic"], row["thread"], row["complaint"], tuple(row.get("rules", ())), row["answer"])
        for row in rows
    )


def reports_of(rule_id: str) -> tuple[FieldReport, ...]:
    """The reports that a rule answers."""
    return tuple(report for report in field_reports() if rule_id in report.rules)
