"""The entry point: run the invoked verb and turn every ending into one message and one exit code.

Heavy imports are inside `run`, where an interrupt is caught.
"""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from types import FrameType
from typing import NoReturn

from miles.errors import ExitCode, MilesError
from miles_cli.errors import report, report_unexpected
from miles_cli.speech import silence

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def main() -> None:
    """The console script `miles`."""
    sys.excepthook = report_unexpected
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A name or a symbol that the stream's encoding lacks becomes a question mark, not an error.
            stream.reconfigure(errors="replace")
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:
        # The reader went away or the disk is full; the interpreter would complain again at exit.
        silence(sys.stdout)
    sys.exit(code)


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code; a user's mistake is one message, a defect travels on."""
    try:
        import typer

        from miles_cli.app import build

        typer.main.get_command(build(argv)).main(args=list(argv), prog_name="miles")
    except SystemExit as ending:
        return int(ending.code or 0)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except MilesError as error:
        return report(error, as_json="--json" in argv)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        return report(_no_room(error))
    return ExitCode.OK


def _no_room(error: OSError) -> MilesError:
    """A full disk is never a defect; without a file's name it is the one that stdout goes to."""
    return MilesError(
        f"cannot write: {error.strerror}",
        where=str(error.filename or "standard output"),
        fix="free space there, or write elsewhere, and type the command again",
    )


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM ends like any other exit, so that unfinished files are taken away."""
    raise SystemExit(ExitCode.TERMINATED)
