"""The way into the dashboard. Importing this imports no Textual: whether it may start is decided first."""

from __future__ import annotations

import sys
from pathlib import Path

from miles.errors import MilesError, Unavailable
from miles.record import RunReader
from miles_cli.dashboard.farewell import farewell
from miles_cli.dashboard.symbols import choose_symbols
from miles_cli.tty import is_interactive


def can_draw() -> bool:
    """Whether a full-screen program may start: it reads keys from stdin and draws on stderr."""
    return sys.stdin.isatty() and is_interactive(sys.stderr)


def run_dashboard(run_dirs: list[Path], symbols: str | None = None) -> int:
    """Show the runs until the user quits; the runs go on. Returns the exit code.

    `symbols` is braille, block or ascii; None asks the locale. Raises Unavailable without a terminal, and
    RunError for a directory that is not a run.
    """
    if not can_draw():
        raise Unavailable(
            "the dashboard needs a terminal on stdin and stderr",
            why="without one it would hang",
            fix="miles watch --plain prints one line per step",
        )
    assert run_dirs
    for run_dir in run_dirs:
        RunReader(run_dir, read=False)
    from miles_cli.dashboard.watch_app import WatchApp

    app = WatchApp(list(run_dirs), choose_symbols(symbols))
    app.run()
    for line in farewell(app.live_runs, app.command):
        print(line, file=sys.stderr)
    if app.return_code:
        raise MilesError("the dashboard stopped with an error; the run is not affected")
    return 0


def serve_dashboard(run_dirs: list[Path], port: int = 8000, symbols: str | None = None) -> int:
    """Show the runs in a browser on this machine until interrupted. Returns the exit code.

    Raises Unavailable when textual-serve is not installed or the port cannot be had, and RunError for a
    directory that is not a run.
    """
    for run_dir in run_dirs:
        RunReader(run_dir, read=False)
    try:
        from miles_cli.dashboard.web import DashboardServer
    except ModuleNotFoundError as error:
        raise Unavailable(
            "the dashboard cannot be shown in a browser",
            why=f"{error.name} is not installed",
            fix="pip install 'miles[web]'",
        ) from error
    try:
        DashboardServer(run_dirs, port, symbols).serve()
    except OSError as error:
        raise Unavailable(
            "the port cannot be had",
            where=f"--port {port}",
            why=error.strerror or str(error),
            fix="another one: miles watch --web --port 8001",
        ) from error
    return 0
