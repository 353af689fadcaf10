"""The report of `miles diagnose`: what is wrong, how it shows, why, and what to type."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from miles.diagnosis import RULES, Finding, Fix, Report, Rule
from miles.diagnosis.reference import rule_lines
from miles.diagnosis.stacks import WorkerStack
from miles_cli.dashboard.symbols import Symbols
from miles_cli.render.fix_text import apply_command, diff_lines
from miles_cli.units import count

STACK_LINES = 24
"""Of each worker's stack in the report; --json and --bundle have all of it."""
WORDS = 8


def report_lines(report: Report, run: str, symbols: Symbols, width: int) -> Iterator[str]:
    """The report in lines, without colour. `run` is how commands name the run."""
    yield headline(report)
    for note in report.notes:
        yield from _wrapped("  note       ", note, width)
    if report.bad_lines:
        yield f"  {count(report.bad_lines, 'line')} of the record could not be read"
    if report.last_phase is not None and report.findings:
        yield f"  last phase {report.last_phase}"
    if not report.findings:
        yield f"{symbols.good} nothing found ({rules_told(report)})"
    for finding in report.findings:
        yield ""
        yield from _finding_lines(finding, report.config, run, symbols, width)
    for stack in report.stacks:
        yield ""
        yield from _stack_lines(stack, width)
    if report.past:
        yield ""
        yield "Raised and cleared on the way:"
        for past in report.past:
            yield f"  {symbols.cleared} {past.rule} {past.title} (steps {past.raised} to {past.cleared})"
    if report.last_words and report.findings:
        yield ""
        yield "Last words:"
        for word in report.last_words[-WORDS:]:
            yield f"  {word.worker}: {word.text.strip()}"[:width]


def headline(report: Report) -> str:
    """The first line: what was read and how far it went."""
    if report.source == "run record":
        return f"{report.run_id}: {report.status}, {count(report.step, 'step')}"
    steps = f", {count(report.step, 'step')}" if report.step else ""
    return f"{report.run_id}: {report.source}{steps}"


def rules_told(report: Report) -> str:
    """How many rules had something to judge by."""
    if not report.without_data:
        return f"{len(RULES)} rules"
    return f"{report.evaluated} of {len(RULES)} rules; the others found none of the metrics they read"


def report_dict(report: Report, run: str) -> dict[str, Any]:
    """The report as values for --json; every fix with its diff and command."""
    findings = []
    for finding in report.findings:
        body = finding.as_dict()
        for values, fix in zip(body["fixes"], finding.fixes, strict=True):
            values["diff"] = list(diff_lines(fix, report.config))
            values["command"] = apply_command(fix, run)
        findings.append(body)
    return {
        "run_id": report.run_id,
        "source": report.source,
        "status": None if report.status is None else report.status.value,
        "step": report.step,
        "exit_code": int(report.exit_code),
        "findings": findings,
        "past": [past.__dict__ for past in report.past],
        "last_phase": report.last_phase,
        "last_words": [{"worker": w.worker, "log": w.log, "text": w.text} for w in report.last_words],
        "stacks": [stack.__dict__ for stack in report.stacks],
        "rules": len(RULES),
        "rules_without_data": list(report.without_data),
        "notes": list(report.notes),
        "bad_lines": report.bad_lines,
    }


def explain_lines(rule: Rule, width: int) -> Iterator[str]:
    """Everything there is to say of a rule."""
    yield f"{rule.id}: {rule.title}"
    for label, text in rule_lines(rule):
        yield from _wrapped(f"  {label:<11}", text, width)


def section_lines(sections: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Sections of name and value, empty ones left out."""
    for title, values in sections.items():
        if values:
            yield title
            size = max(map(len, values))
            yield from (f"  {name:<{size}}  {value}" for name, value in values.items())


def _finding_lines(
    finding: Finding, config: dict[str, Any], run: str, symbols: Symbols, width: int
) -> Iterator[str]:
    since = "" if finding.step is None else f" (step {finding.step})"
    mark = symbols.severity(finding.severity)
    yield f"{mark} {finding.severity} {finding.rule} {finding.title}{since}"
    for evidence in finding.evidence:
        yield from _wrapped("  evidence   ", evidence.text, width)
    yield from _wrapped("  cause      ", finding.cause, width)
    for fix in finding.fixes:
        yield from _fix_lines(fix, config, run, width)


def _fix_lines(fix: Fix, config: dict[str, Any], run: str, width: int) -> Iterator[str]:
    yield from _wrapped("  fix        ", f"{fix.text} ({fix.kind})", width)
    for line in diff_lines(fix, config):
        yield f"    {line}"
    if fix.risk != "none":
        yield from _wrapped("    risk     ", fix.risk, width)
    command = apply_command(fix, run)
    if command is not None:
        yield f"    $ {command}"


def _stack_lines(stack: WorkerStack, width: int) -> Iterator[str]:
    where = "" if stack.phase is None else f", in {stack.phase}"
    yield f"Stack of {stack.writer} (process {stack.pid}{where}):"
    if stack.text is None:
        yield from _wrapped("  ", stack.problem, width)
        return
    lines = stack.text.splitlines()
    yield from (f"  {line}"[:width] for line in lines[:STACK_LINES])
    if len(lines) > STACK_LINES:
        yield f"  ... {count(len(lines) - STACK_LINES, 'line')} more with --json"


def _wrapped(head: str, text: str, width: int) -> Iterator[str]:
    """`text` behind `head`, its further lines indented as far."""
    yield from textwrap.wrap(
        text,
        max(40, width),
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )
