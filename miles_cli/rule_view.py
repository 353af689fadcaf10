"""A preflight rule as text: what it looks for, why, what mends it, and who ran into it."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from miles.errors import ConfigError, MilesError
from miles.planning.field_reports import reports_of
from miles.planning.rules import REGISTRY, Rule


def find_rule(rule_id: str) -> Rule:
    """The rule of this id in any case. Raises: ConfigError, naming near ones."""
    rule = REGISTRY.get(rule_id.upper())
    if rule is None:
        near = get_close_matches(rule_id.upper(), REGISTRY, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ConfigError(
            MilesError(
                f"no preflight rule is called {rule_id!r}",
                fix=f"{hint}miles plan rules lists them; miles diagnose --explain has those of a run",
            )
        )
    return rule


def rule_lines(rule: Rule) -> Iterator[str]:
    """The rule in lines, without colour."""
    yield f"{rule.id} ({rule.severity}): {rule.title}"
    yield f"  why: {rule.cause}"
    yield f"  fix: {rule.fix}"
    for report in reports_of(rule.id):
        yield f"  seen: {report.thread}: {report.complaint}"
    yield f"  doc: {rule.doc}"


def rule_dict(rule: Rule) -> dict[str, Any]:
    """JSON-able values."""
    return {
        "rule": rule.id,
        "severity": str(rule.severity),
        "title": rule.title,
        "cause": rule.cause,
        "fix": rule.fix,
        "local": rule.local,
        "doc": rule.doc,
        "seen": [report.thread for report in reports_of(rule.id)],
    }
