"""What preflight says: findings with a rule id, a cause and a next step, and the refusal made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import groupby
from typing import TYPE_CHECKING, Any

from miles.errors import PreflightRefused

if TYPE_CHECKING:
    from miles.planning.outline import Outline


class Severity(StrEnum):
    """How much a finding matters; any `error` refuses the run."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


@dataclass(frozen=True)
class Found:
    """What a rule saw: the facts of this run, the setting they concern, and what to type next."""

    what: str
    setting: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Finding:
    """One rule that fired on one run. `setting` is the key concerned, `where` the place that set it."""

    rule: str
    severity: Severity
    title: str
    what: str
    setting: str
    where: str
    cause: str
    fix: str
    doc: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)

    @property
    def place_and_what(self) -> str:
        """Where it is and what was seen, in one line."""
        return f"{self.where}: {self.what}" if self.where else self.what


class PlanRefused(PreflightRefused):
    """The plan breaks at least one rule of severity error; `findings` holds everything preflight saw.

    `outline` is what could be planned all the same: the layout and memory on GPUs.
    """

    def __init__(self, *findings: Finding, outline: Outline | None = None) -> None:
        ValueError.__init__(self, *findings)
        self.findings = findings
        self.outline = outline
        self.what = _report(findings)
        self.where = self.why = self.fix = ""

    def __str__(self) -> str:
        return self.what


def _report(findings: Sequence[Finding]) -> str:
    errors = sum(finding.severity is Severity.ERROR for finding in findings)
    head = f"preflight refused the run: {errors} error{'s' if errors != 1 else ''}"
    return "\n".join([head, *finding_lines(findings)])


def finding_lines(findings: Iterable[Finding]) -> Iterator[str]:
    """Findings as text. What one rule says several times has its cause once; equal fixes stand together."""
    for _, group in groupby(findings, key=lambda finding: (finding.severity, finding.rule)):
        same_rule = list(group)
        first = same_rule[0]
        if len(same_rule) == 1:
            yield f"{first.severity} {first.rule} {first.place_and_what}"
            yield f"  why: {first.cause}"
            yield f"  fix: {first.fix}"
            continue
        yield f"{first.severity} {first.rule} {first.title}: {len(same_rule)} times"
        yield f"  why: {first.cause}"
        for fix, alike in groupby(sorted(same_rule, key=lambda f: f.fix), key=lambda finding: finding.fix):
            yield from (f"  {finding.place_and_what}" for finding in alike)
            yield f"    fix: {fix}"
