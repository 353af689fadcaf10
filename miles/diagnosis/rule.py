"""A rule: an id, a signature over the record, and everything `--explain` and the docs say about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from miles.diagnosis.finding import Finding, Match, Severity, Tier
from miles.diagnosis.view import RecordView

Signature = Callable[[RecordView], Match | None]


@dataclass(frozen=True)
class Rule:
    """One row of the rule base. `severity` is the worst it can be."""

    id: str
    title: str
    tier: Tier
    severity: Severity
    symptom: str
    """The signature in words."""
    cause: str
    remedy: str
    source: str
    thresholds: tuple[str, ...]
    """Names of the fields of Thresholds that the signature compares with."""
    signature: Signature

    def check(self, view: RecordView) -> Finding | None:
        """The finding when the signature is there."""
        match = self.signature(view)
        if match is None:
            return None
        return Finding(
            rule=self.id,
            title=match.title or self.title,
            severity=match.severity or self.severity,
            tier=self.tier,
            step=match.step,
            cause=match.cause or self.cause,
            evidence=match.evidence,
            fixes=match.fixes,
            source=self.source,
        )


def rule(
    id: str,
    title: str,
    *,
    tier: Tier,
    severity: Severity,
    symptom: str,
    cause: str,
    remedy: str,
    source: str,
    thresholds: tuple[str, ...] = (),
) -> Callable[[Signature], Rule]:
    """Make a Rule of the decorated signature."""
    return lambda signature: Rule(
        id, title, tier, severity, symptom, cause, remedy, source, thresholds, signature
    )
