"""The entry point: run the invoked verb and turn every ending into one message and one exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from miles.errors import ExitCode, MilesError
from miles_cli.app import build
from miles_cli.errors import report, report_unexpected


def main() -> None:
    """The console script `miles`."""
    sys.excepthook = report_unexpected
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader went away; the interpreter would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code; a user's mistake is one message, a defect travels on."""
    import typer

    try:
        typer.main.get_command(build(argv)).main(args=list(argv), prog_name="miles")
    except SystemExit as ending:
        return int(ending.code or 0)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except MilesError as error:
        return report(error, as_json="--json" in argv)
    return ExitCode.OK
