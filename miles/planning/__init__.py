"""Facts, layout, preflight rules: everything decided before a run starts.

>>> plan = make_plan(resolved, collect_facts(resolved.config))
"""

from __future__ import annotations

from miles.planning.facts import Facts, collect_facts
from miles.planning.findings import Finding, PlanRefused, Severity
from miles.planning.plan import Plan, make_plan
from miles.planning.preflight import preflight

__all__ = ["Facts", "Finding", "Plan", "PlanRefused", "Severity", "collect_facts", "make_plan", "preflight"]
