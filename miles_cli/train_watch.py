"""`miles train --watch`: the run in a process of its own, the dashboard in this one."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from miles.errors import ConfigError, ExitCode, MilesError
from miles_cli import detached
from miles_cli.dashboard.app import can_draw, run_dashboard
from miles_cli.speech import say

POLL_SECONDS = 0.1


def refuse_without_terminal() -> None:
    """Raises ConfigError where no dashboard can be drawn."""
    if not can_draw():
        raise ConfigError(
            MilesError(
                "--watch needs a terminal on stdin and stderr",
                why="here the dashboard would hang",
                fix="leave --watch out: without it one line per step is printed",
            )
        )


def train_and_watch(arguments: Sequence[str], runs_dir: Path) -> int:
    """Start `miles ARGUMENTS` and watch it. Returns its exit code if it has ended, 0 if it goes on."""
    run = detached.start(arguments, detached.starting_log(runs_dir))
    try:
        run_dir = _await_run_dir(run)
    except KeyboardInterrupt:
        run.process.send_signal(signal.SIGINT)
        run.process.wait()
        run.log.unlink()
        return ExitCode.INTERRUPTED
    if run_dir is None:
        run.log.unlink()
        return run.process.wait()
    run.keep_log_in(run_dir / "logs")
    run_dashboard([run_dir])
    if run.exit_code is not None:
        return run.exit_code
    say(f"The run goes on. Stop it: miles runs stop {run_dir}", sys.stderr)
    return ExitCode.OK


def _await_run_dir(run: detached.Detached) -> Path | None:
    """Repeat what the run says until it has a directory; None when it ended before."""
    shown = 0
    while True:
        ended = run.exit_code is not None
        news = run.said(shown)
        shown += len(news)
        sys.stderr.write(news.decode("utf-8", "replace"))
        sys.stderr.flush()
        if (run_dir := run.run_dir()) is not None or ended:
            return run_dir
        time.sleep(POLL_SECONDS)
