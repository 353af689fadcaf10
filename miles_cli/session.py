"""One run from its plan to its last words, for every verb that runs something."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from miles import environment
from miles.errors import RunError
from miles.planning.findings import finding_lines
from miles_cli.errors import report
from miles_cli.run_view import RunView, print_json_line
from miles_cli.speech import say
from miles_cli.summary_view import summary_lines

if TYPE_CHECKING:
    from miles.orchestration.launch import RunOutcome
    from miles.planning import Plan


def prepare(plan: Plan) -> None:
    """Set the environment of a plan and say its warnings. Comes before torch loads, which reads it once."""
    assert "torch" not in sys.modules, "the environment of a plan must be set before torch loads"
    for name, value in plan.exports:
        environment.export(name, value)
    for line in finding_lines(plan.findings):
        say(line, sys.stderr)


def conduct(start: Callable[[RunView], RunOutcome], as_json: bool = False, quiet: bool = False) -> int:
    """Show a run while it goes on and how it ended. Returns its exit code."""
    view = RunView(as_json, quiet)
    with view.live():
        outcome = start(view)
    if as_json:
        print_json_line({"run_dir": str(outcome.run_dir), "summary": asdict(outcome.summary)})
    if outcome.error is not None:
        report(outcome.error)
    stream = sys.stderr if as_json else sys.stdout
    try:
        for line in summary_lines(outcome.run_dir, outcome.summary):
            say(line, stream)
    except RunError as error:
        # The directory was taken away under the run; that does not change how it ended.
        report(error)
    return int(outcome.exit_code)
