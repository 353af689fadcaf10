"""The report of `miles diagnose` as Markdown, for an issue or a chat."""

from __future__ import annotations

from collections.abc import Iterator

from miles.diagnosis import Finding, Fix, Report
from miles_cli.render.fix_text import apply_command, diff_lines
from miles_cli.render.report_text import headline, rules_told


def markdown_lines(report: Report, run: str) -> Iterator[str]:
    """The report in Markdown. `run` is how commands name the run."""
    yield f"## {headline(report)}"
    yield from (f"\n_{note}_" for note in report.notes)
    if report.last_phase is not None:
        yield f"\nLast phase: {report.last_phase}"
    if not report.findings:
        yield f"\nNothing found ({rules_told(report)})."
    for finding in report.findings:
        yield from _finding(finding, report, run)
    for stack in report.stacks:
        yield f"\n<details><summary>Stack of {stack.writer} (process {stack.pid})</summary>\n"
        yield f"```\n{stack.text if stack.text is not None else stack.problem}\n```\n</details>"
    if report.past:
        yield "\n### Raised and cleared on the way\n"
        yield from (f"- {p.rule} {p.title} (steps {p.raised} to {p.cleared})" for p in report.past)
    if report.last_words and report.findings:
        yield "\n### Last words\n\n```"
        yield from (f"{word.worker}: {word.text.strip()}" for word in report.last_words)
        yield "```"


def _finding(finding: Finding, report: Report, run: str) -> Iterator[str]:
    since = "" if finding.step is None else f" (step {finding.step})"
    yield f"\n### {finding.severity} {finding.rule}: {finding.title}{since}\n"
    yield from (f"- {evidence.text}" for evidence in finding.evidence)
    yield f"\n**Cause:** {finding.cause}\n"
    for fix in finding.fixes:
        yield from _fix(fix, report, run)


def _fix(fix: Fix, report: Report, run: str) -> Iterator[str]:
    risk = "" if fix.risk == "none" else f"; risk: {fix.risk}"
    yield f"**Fix** ({fix.kind}): {fix.text}{risk}"
    diff = list(diff_lines(fix, report.config))
    if diff:
        yield "\n```diff"
        yield from diff
        yield "```"
    command = apply_command(fix, run)
    if command is not None:
        yield f"\n```\n{command}\n```"
    yield ""
