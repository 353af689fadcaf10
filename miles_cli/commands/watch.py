"""`miles watch`: look at runs, in the dashboard, line by line, or once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from miles.errors import ConfigError, ExitCode, MilesError
from miles_cli.commands.runs import RUN_HELP, Json, RunsDir, complete_run, find_run

if TYPE_CHECKING:
    from miles.record import RunStatus

app = typer.Typer()

EPILOG = (
    "In a terminal the dashboard opens; elsewhere, and with --plain, one line per step. Exit codes: 0 the "
    "dashboard was closed, or the run finished or was stopped on request · 1 it failed or is dead · 8 it "
    "still runs (--once) · 130 it was interrupted; of several runs, the first that is not 0. --once --json: "
    "{run_id, status, step, total_steps, eta_seconds, open_phases, metrics, unhealthy, alerts}, one object "
    "per run; without --once, one object per event."
)
WEB_PORT = 8000
RunNames = Annotated[
    list[str] | None, typer.Argument(metavar="[RUN]...", help=RUN_HELP, autocompletion=complete_run)
]


@app.command(epilog=EPILOG)
def watch(
    runs: RunNames = None,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and exit.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="One line per step, in a terminal too.")] = False,
    web: Annotated[
        bool, typer.Option("--web", help="Show the dashboard in a browser, on this machine only.")
    ] = False,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help=f"Port of --web; default: {WEB_PORT}.")
    ] = None,
    as_json: Json = False,
    symbols: Annotated[
        str | None, typer.Option(help="braille, block or ascii; default: what the terminal can show.")
    ] = None,
    runs_dir: RunsDir = None,
) -> None:
    """Look at runs: their curves, phases and alerts."""
    _refuse_contradictions(once, plain, web, port, as_json)
    _refuse_unknown(symbols)
    found = [find_run(name, runs_dir) for name in runs or (None,)]
    if once:
        raise typer.Exit(worst_exit_code([_print_frame(path, as_json, symbols) for path in found]))
    if web:
        from miles_cli.dashboard.app import serve_dashboard

        raise typer.Exit(serve_dashboard(found, port or WEB_PORT, symbols))
    from miles_cli.dashboard.app import can_draw, run_dashboard

    if plain or as_json or not can_draw():
        from miles_cli.watch_lines import follow

        raise typer.Exit(worst_exit_code(follow(found, as_json)))
    raise typer.Exit(run_dashboard(found, symbols))


def _refuse_contradictions(once: bool, plain: bool, web: bool, port: int | None, as_json: bool) -> None:
    """Raises ConfigError for options of which one would be ignored."""
    ways = {"--once": once, "--plain": plain, "--web": web}
    chosen = [name for name, said in ways.items() if said]
    if len(chosen) > 1:
        raise ConfigError(MilesError(f"{chosen[0]} and {chosen[1]} exclude each other"))
    if web and as_json:
        raise ConfigError(MilesError("--web and --json exclude each other"))
    if port is not None and not web:
        raise ConfigError(MilesError("--port belongs to --web", fix="add --web"))


def _refuse_unknown(symbols: str | None) -> None:
    """Raises ConfigError for symbols that no terminal has."""
    if symbols is None:
        return
    from miles_cli.dashboard.symbols import LADDER

    if symbols not in LADDER:
        fix = f"take one of {', '.join(LADDER)}"
        raise ConfigError(MilesError(f"there are no symbols {symbols!r}", "--symbols", fix=fix))


def exit_code(status: RunStatus) -> ExitCode:
    """How a run ended, as an exit code."""
    from miles.record import RunStatus

    return {
        RunStatus.RUNNING: ExitCode.RUNNING,
        RunStatus.EMPTY: ExitCode.RUNNING,
        RunStatus.FAILED: ExitCode.FAILED,
        RunStatus.DEAD: ExitCode.FAILED,
        RunStatus.INTERRUPTED: ExitCode.INTERRUPTED,
    }.get(status, ExitCode.OK)


def worst_exit_code(statuses: list[RunStatus]) -> ExitCode:
    """Of several runs, the first code that is not 0."""
    codes = [exit_code(status) for status in statuses]
    return next((code for code in codes if code), ExitCode.OK)


def _print_frame(run_dir: Path, as_json: bool, symbols: str | None) -> RunStatus:
    from miles_cli.dashboard.symbols import choose_symbols
    from miles_cli.render.json_text import json_text
    from miles_cli.render.run_frame import frame_lines, load_snapshot, snapshot_dict

    snapshot = load_snapshot(run_dir)
    if as_json:
        typer.echo(json_text(snapshot_dict(snapshot)))
        return snapshot.status
    width = shutil.get_terminal_size((80, 24)).columns
    for line in frame_lines(snapshot, width, choose_symbols(symbols)):
        typer.echo(line)
    typer.echo(f"Next: miles diagnose {snapshot.run_id}", err=True)
    return snapshot.status
