"""Run every rule on a run that has not started."""

from __future__ import annotations

from miles.config import ResolvedConfig
from miles.planning.facts import Facts
from miles.planning.findings import Finding, Severity
from miles.planning.rules import REGISTRY
from miles.planning.subject import Subject

_ORDER = (Severity.ERROR, Severity.WARNING, Severity.INFO)


def preflight(resolved: ResolvedConfig, facts: Facts) -> tuple[Finding, ...]:
    """Everything that the rules have to say, errors first; nothing of this machine if another is assumed."""
    subject = Subject(resolved, facts)
    elsewhere = facts.assumed is not None
    findings = [
        finding
        for rule in REGISTRY.values()
        if not (elsewhere and rule.local)
        for finding in rule.findings(subject)
    ]
    return tuple(sorted(findings, key=lambda finding: _ORDER.index(finding.severity)))
