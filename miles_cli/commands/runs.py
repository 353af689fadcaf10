"""`miles runs`: list, show, compare, change, stop and resume runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from miles import environment
from miles.errors import ExitCode, RunError

if TYPE_CHECKING:
    from miles.orchestration.launch import RunOutcome
    from miles_cli.run_view import RunView

app = typer.Typer(help="List, show, compare, change, stop and resume runs.", no_args_is_help=True)
runs_app = app

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
RunsDir = Annotated[
    Path | None, typer.Option("--runs-dir", help="Directory of runs; default: MILES_RUNS_DIR, else runs/.")
]
AskedBy = Annotated[str, typer.Option("--by", hidden=True, help="Who asks, for the record.")]
A_RUN = "A run: its id, the beginning of it, its path, or `last`."
RUN_HELP = f"{A_RUN} Default: the latest run."


def complete_run(incomplete: str) -> list[str]:
    """Run ids for shell completion; reads names only."""
    root = environment.runs_dir()
    names = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    return ["last", *sorted((n for n in names if n.startswith(incomplete)), reverse=True)]


def complete_live_setting(incomplete: str) -> list[str]:
    """Keys of live settings for shell completion."""
    from miles.diagnosis.live import LIVE_SETTINGS

    return [f"{key}=" for key in sorted(LIVE_SETTINGS) if key.startswith(incomplete)]


RunName = Annotated[str | None, typer.Argument(metavar="[RUN]", help=RUN_HELP, autocompletion=complete_run)]


def find_run(reference: str | None, runs_dir: Path | None) -> Path:
    """The run that the user means. Raises RunError with a suggestion when there is none."""
    from miles.record.runs import resolve_run

    return resolve_run(reference, runs_dir or environment.runs_dir())


@app.command("ls")
def list_runs(as_json: Json = False, runs_dir: RunsDir = None) -> None:
    """List runs, the most recently active first."""
    from miles.record.runs import describe_run, find_runs
    from miles_cli.render.json_text import json_text
    from miles_cli.render.runs_text import table_lines
    from miles_cli.submitted import bring_up_to_date

    root = runs_dir or environment.runs_dir()
    paths = find_runs(root)
    for path in paths:
        bring_up_to_date(path)
    runs = [describe_run(path) for path in paths]
    if as_json:
        typer.echo(json_text([{**run.__dict__, "status": run.status.value} for run in runs]))
        return
    if not runs:
        typer.echo(f"No runs in {root}. Start one: miles train --profile quickstart", err=True)
        return
    for line in table_lines(runs):
        typer.echo(line)
    typer.echo("Next: miles runs show RUN · miles watch RUN · miles diagnose RUN", err=True)


@app.command("show", epilog="Exit codes: 0 the run has ended · 8 it is still running.")
def show(run: RunName = None, as_json: Json = False, runs_dir: RunsDir = None) -> None:
    """Show one run: status, settings, checkpoints, results and last values."""
    from miles.record import RunReader
    from miles_cli.render.json_text import json_text
    from miles_cli.render.runs_text import run_dict, run_lines
    from miles_cli.submitted import bring_up_to_date

    run_dir = find_run(run, runs_dir)
    bring_up_to_date(run_dir)
    reader = RunReader(run_dir)
    values = run_dict(reader)
    if as_json:
        typer.echo(json_text(values))
    else:
        for line in run_lines(values):
            typer.echo(line)
        if values["ended_by"]:
            typer.echo(f"Next: miles diagnose {values['id']}", err=True)
    if not reader.status().ended:
        raise typer.Exit(ExitCode.RUNNING)


@app.command("stop")
def stop(
    run: RunName = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the run has ended.")] = False,
    as_json: Json = False,
    runs_dir: RunsDir = None,
) -> None:
    """Ask a run to stop: it finishes its step, saves a checkpoint and ends."""
    from miles.record import RunReader, RunStatus
    from miles_cli.render.json_text import json_text
    from miles_cli.submitted import ask_to_stop, bring_up_to_date, is_submitted, wait_for_end

    run_dir = find_run(run, runs_dir)
    bring_up_to_date(run_dir)
    status = RunReader(run_dir, read=False).status()
    # A job that waits for room has written nothing yet, and can be stopped.
    waits = is_submitted(run_dir) and status is RunStatus.EMPTY
    if status is not RunStatus.RUNNING and not waits:
        raise RunError(
            "there is nothing to stop",
            where=run_dir.name,
            why=f"the run is {status}",
        )
    request = ask_to_stop(run_dir, "cli")
    if wait:
        status = wait_for_end(run_dir)
    if as_json:
        typer.echo(json_text({"run_id": run_dir.name, "request": request, "status": status.value}))
    elif wait:
        typer.echo(f"{run_dir.name}: {status}")
    else:
        typer.echo(f"{run_dir.name}: asked to stop at the end of its step")


@app.command("set", epilog="Exit codes: 0 posted, or applied with --wait · 1 not running, or refused.")
def set_live(
    run: Annotated[str, typer.Argument(metavar="RUN", help=A_RUN, autocompletion=complete_run)],
    changes: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE...",
            help="A live setting and its new value, such as optimizer.lr=1e-4.",
            autocompletion=complete_live_setting,
        ),
    ],
    wait: Annotated[bool, typer.Option("--wait", help="Return when the run has answered.")] = False,
    as_json: Json = False,
    runs_dir: RunsDir = None,
) -> None:
    """Change live settings of a running run, at the end of its step."""
    from miles.record import RunReader, RunStatus, post_request
    from miles_cli.live_settings import parse_changes, wait_for_answer
    from miles_cli.render.json_text import json_text

    patch = parse_changes(changes)
    run_dir = find_run(run, runs_dir)
    status = RunReader(run_dir, read=False).status()
    if status is not RunStatus.RUNNING:
        sets = "".join(f" --set {change}" for change in changes)
        raise RunError(
            "there is nothing to change",
            where=run_dir.name,
            why=f"the run is {status}",
            fix=f"miles runs resume {run_dir.name}{sets}" if status.ended else "",
        )
    request = post_request(run_dir, "set", patch=patch)
    answer = wait_for_answer(run_dir, request.id) if wait else None
    if as_json:
        state = None if answer is None else answer["state"]
        typer.echo(json_text({"run_id": run_dir.name, "request": request.id, "patch": patch, "state": state}))
    elif answer is None:
        typer.echo(f"{run_dir.name}: asked to change {', '.join(changes)} at the end of its step")
    else:
        typer.echo(f"{run_dir.name}: {', '.join(changes)} {answer['state']}")
    if answer is not None and answer["state"] != "applied":
        why, fix = (str(answer.get(name, "")) for name in ("why", "fix"))
        raise RunError("the run refused the change", where=run_dir.name, why=why, fix=fix)


@app.command("resume")
def resume_run(
    run: RunName = None,
    from_step: Annotated[
        int | None,
        typer.Option("--from-step", help="Go on after this step's checkpoint; default: the newest."),
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="section.name=value: change a setting from here on.")
    ] = None,
    stop_first: Annotated[
        bool,
        typer.Option("--stop", help="A run that still goes on is stopped first: it ends its step and saves."),
    ] = False,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No line per step.")] = False,
    asked_by: AskedBy = "cli",
    runs_dir: RunsDir = None,
) -> None:
    """Go on with a run that ended early, from its last checkpoint, in the same directory."""
    from miles.orchestration.continuation import plan_continuation
    from miles_cli.session import conduct, prepare
    from miles_cli.submitted import bring_up_to_date, is_submitted

    run_dir = find_run(run, runs_dir)
    bring_up_to_date(run_dir)
    resolved, plan = plan_continuation(run_dir, sets or ())
    if stop_first:
        stop_and_wait(run_dir, asked_by)
    if is_submitted(run_dir):
        from miles.orchestration.submission import resubmit

        def again(observer: RunView) -> RunOutcome:
            changes = tuple(sets or ())
            return resubmit(run_dir, resolved, plan, observer, from_step=from_step, sets=changes, by=asked_by)

        raise typer.Exit(conduct(again, as_json, quiet))
    prepare(plan)

    from miles.orchestration.resume import resume

    def start(observer: RunView) -> RunOutcome:
        return resume(
            run_dir, resolved, plan, from_step=from_step, sets=sets or (), by=asked_by, observer=observer
        )

    raise typer.Exit(conduct(start, as_json, quiet))


def stop_and_wait(run_dir: Path, by: str) -> None:
    """Ask a run that goes on to stop, and wait until it has; nothing to do for one that has ended."""
    from miles.record import RunReader, RunStatus
    from miles_cli.submitted import ask_to_stop, wait_for_end

    if RunReader(run_dir, read=False).status() is RunStatus.RUNNING:
        ask_to_stop(run_dir, by)
        wait_for_end(run_dir)


@app.command(
    "diff",
    epilog="--json: {left, right, differences: [{key, left: {value, origin}, right}], results: [{name, left, "
    "right}]}. What only changes where and when a run happened is a difference too.",
)
def diff(
    left: Annotated[str, typer.Argument(help=A_RUN, autocompletion=complete_run)],
    right: Annotated[str, typer.Argument(help="The run to compare it with.", autocompletion=complete_run)],
    as_json: Json = False,
    runs_dir: RunsDir = None,
) -> None:
    """Compare two runs: every setting in which they differ, and what came of them."""
    from miles.record import RunReader
    from miles_cli.config_source import load_config
    from miles_cli.render.config_text import difference_lines, differences
    from miles_cli.render.json_text import json_text
    from miles_cli.render.run_difference import result_lines, result_rows

    ours, theirs = find_run(left, runs_dir), find_run(right, runs_dir)
    found = differences(load_config(str(ours)), load_config(str(theirs)))
    rows = result_rows(RunReader(ours), RunReader(theirs))
    if as_json:
        told = [item.as_dict() for item in found]
        typer.echo(json_text({"left": ours.name, "right": theirs.name, "differences": told, "results": rows}))
        return
    for line in difference_lines(found, ours.name, theirs.name):
        typer.echo(line)
    if not found:
        typer.echo("No setting differs.", err=True)
    for line in result_lines(rows, ours.name, theirs.name):
        typer.echo(line)
