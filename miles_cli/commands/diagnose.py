"""`miles diagnose`: the cause of what a run shows, with evidence and a fix."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from miles import environment
from miles.errors import ConfigError, MilesError, RunError
from miles_cli.commands.runs import Json, RunsDir, complete_run, find_run

if TYPE_CHECKING:
    from miles.diagnosis import Report
    from miles.diagnosis.redact import Redactor

app = typer.Typer()

EPILOG = (
    "Exit codes: 0 nothing critical · 5 a critical condition · 1 no such run · 2 no such rule. "
    "--json: {run_id, source, status, step, exit_code, findings: [{rule, title, severity, tier, step, cause, "
    "evidence, fixes: [{text, kind, risk, patch, diff, command}]}], past, last_phase, last_words, stacks, "
    "rules, rules_without_data, notes}."
)
WIDTH = 110
TARGET_HELP = (
    "A run (id, beginning of it, path, or `last`), or what another system left: a directory of TensorBoard "
    "event files, JSON metrics or logs, or one such file. Default: the latest run."
)


def complete_target(incomplete: str) -> list[str]:
    """Run ids and paths for shell completion."""
    parent = Path(incomplete).parent if incomplete else Path()
    paths = [str(p) for p in sorted(parent.glob("*")) if str(p).startswith(incomplete)] if incomplete else []
    return [*complete_run(incomplete), *paths]


@app.command(epilog=EPILOG)
def diagnose(
    target: Annotated[
        str | None, typer.Argument(metavar="[TARGET]", help=TARGET_HELP, autocompletion=complete_target)
    ] = None,
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for an issue.")] = False,
    explain: Annotated[
        str | None, typer.Option(metavar="RULE", help="Explain a rule, such as MM6, and look at no run.")
    ] = None,
    env: Annotated[
        bool, typer.Option("--env", help="Print versions, hardware and variables instead, redacted.")
    ] = False,
    bundle: Annotated[
        Path | None,
        typer.Option(metavar="FILE.tar.gz", help="Also pack record, logs and report, redacted, into a file."),
    ] = None,
    stacks: Annotated[
        bool, typer.Option("--stacks", help="Dump the stack of every live worker on this machine.")
    ] = False,
    runs_dir: RunsDir = None,
) -> None:
    """Name the cause of what a run shows, with evidence and a fix as a change to its config."""
    if explain is not None:
        _explain(explain.upper(), as_json)
        return
    if env:
        _print_surroundings(as_json)
        return
    path, is_run = locate(target, runs_dir)
    report = _report(path, is_run, stacks)
    typer.echo("\n".join(_render(report, path, as_json, markdown)))
    if bundle is not None:
        _pack(bundle, path, is_run, report)
    raise typer.Exit(report.exit_code)


def locate(target: str | None, runs_dir: Path | None) -> tuple[Path, bool]:
    """(path, whether it is a run of ours). A run id wins over a path of the same name."""
    from miles.record.runs import is_run

    path = None if target is None else Path(target).expanduser()
    try:
        return find_run(target, runs_dir), True
    except RunError as error:
        if path is None or not path.exists():
            raise _nothing_named(target, error) from error
    return path, is_run(path)


def _nothing_named(target: str | None, error: RunError) -> RunError:
    if target is None:
        return error
    why = error.why or "nor is there a file or directory of that name"
    return RunError(error.what, where=error.where, why=why, fix=error.fix)


def _report(path: Path, is_run: bool, stacks: bool) -> Report:
    from miles.diagnosis import diagnose as diagnose_run
    from miles.diagnosis.foreign.source import diagnose_path
    from miles.record import RunReader

    return diagnose_run(RunReader(path), stacks=stacks) if is_run else diagnose_path(path)


def _render(report: Report, path: Path, as_json: bool, markdown: bool) -> list[str]:
    from miles_cli.dashboard.symbols import choose_symbols
    from miles_cli.render.json_text import json_text
    from miles_cli.render.report_markdown import markdown_lines
    from miles_cli.render.report_text import report_dict, report_lines

    if as_json:
        return [json_text(report_dict(report, str(path)))]
    if markdown:
        return list(markdown_lines(report, str(path)))
    return list(report_lines(report, str(path), choose_symbols(), _width()))


def _pack(bundle: Path, path: Path, is_run: bool, report: Report) -> None:
    """Write the bundle and say on stderr what went in, so that it can be judged before it is sent."""
    from miles.diagnosis.bundle import write_bundle
    from miles.diagnosis.surroundings import surroundings
    from miles_cli.render.json_text import json_text
    from miles_cli.units import binary_bytes

    redactor = _redactor(path)
    extras = {
        "report.md": "\n".join(_render(report, path, as_json=False, markdown=True)) + "\n",
        "report.json": "\n".join(_render(report, path, as_json=True, markdown=False)) + "\n",
        "environment.json": json_text(surroundings(redactor)) + "\n",
    }
    packed = write_bundle(bundle, path, extras, redactor, is_run)
    typer.echo(f"{bundle} ({binary_bytes(bundle.stat().st_size)}) holds:", err=True)
    for file in packed:
        note = f"  ({file.note})" if file.note else ""
        typer.echo(f"  {binary_bytes(file.size):>10}  {file.name}{note}", err=True)
    typer.echo(
        "Secrets, home directories and user names were taken out; samples and checkpoints were left out. "
        "Look through it before you send it.",
        err=True,
    )


def _print_surroundings(as_json: bool) -> None:
    from miles.diagnosis.surroundings import surroundings
    from miles_cli.render.json_text import json_text
    from miles_cli.render.report_text import section_lines

    found = surroundings(_redactor())
    typer.echo(json_text(found) if as_json else "\n".join(section_lines(found)))


def _redactor(path: Path | None = None) -> Redactor:
    """Knows the user who runs this and the owner of the files."""
    from miles.diagnosis.redact import Redactor

    return Redactor(environment.user_names(path), homes=(str(Path.home()),))


def _explain(rule_id: str, as_json: bool) -> None:
    from difflib import get_close_matches

    from miles.diagnosis import BY_ID
    from miles.diagnosis.not_evaluated import NOT_EVALUATED
    from miles.diagnosis.reference import rule_lines
    from miles_cli.render.json_text import json_text
    from miles_cli.render.report_text import explain_lines

    missing = next((row for row in NOT_EVALUATED if row.id == rule_id), None)
    if missing is not None:
        raise RunError(
            f"{rule_id} ({missing.symptom}) is not evaluated", why=f"the record lacks: {missing.lacks}"
        )
    rule = BY_ID.get(rule_id)
    if rule is None:
        near = get_close_matches(rule_id, BY_ID, n=1) or ["one of them"]
        raise ConfigError(
            MilesError(
                f"there is no rule {rule_id!r}", why=f"rules: {', '.join(BY_ID)}", fix=f"try {near[0]}"
            )
        )
    if as_json:
        typer.echo(json_text({"rule": rule.id, "title": rule.title, **dict(rule_lines(rule))}))
        return
    for line in explain_lines(rule, _width()):
        typer.echo(line)


def _width() -> int:
    return min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
