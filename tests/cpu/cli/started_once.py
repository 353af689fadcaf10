"""`miles` for tests that start it hundreds of times: a process that has imported what every command imports,
and forks for each command line.

stdin: a JSON object a line (words, cwd, environment, and the files stdout and stderr); stdout: exit codes.

A command runs in a process of its own with nothing but its own environment and files, as if it had been
started; what is imported at start-up is measured by `test_startup`, with real starts.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from importlib import import_module
from typing import Any

from miles_cli import main

IMPORTED = ("miles.config", "miles.planning", "miles_cli.commands.train")


def run(call: dict[str, Any]) -> None:
    """In the child: this command line, until its end."""
    for descriptor, (path, mode) in enumerate(
        ((os.devnull, os.O_RDONLY), (call["stdout"], os.O_WRONLY), (call["stderr"], os.O_WRONLY))
    ):
        opened = os.open(path, mode)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(call["cwd"])
    os.environ.clear()
    os.environ.update(call["environment"])
    sys.argv = ["miles", *call["words"]]
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, closefd=False) for number, mode in enumerate("rww")
    )
    code: Any = 1
    try:
        main.main()
    except SystemExit as ending:
        code = ending.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    threading._shutdown()  # type: ignore[attr-defined]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def serve() -> None:
    for name in IMPORTED:
        import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
