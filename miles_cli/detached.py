"""A run in a process of its own, which goes on when the terminal that started it goes away."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from miles_cli.run_view import RUN_DIRECTORY

_RUN_DIR = re.compile(rf"^{re.escape(RUN_DIRECTORY)}(.+?)(?:, attempt \d+)?\n", re.MULTILINE)


@dataclass
class Detached:
    """A `miles` command that was started; `log` holds what it says."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def exit_code(self) -> int | None:
        """None while it goes on."""
        return self.process.poll()

    def said(self, since: int = 0) -> bytes:
        """What it has said from byte `since` on."""
        with self.log.open("rb") as file:
            file.seek(since)
            return file.read()

    def run_dir(self) -> Path | None:
        """The run directory, once it has named it."""
        found = _RUN_DIR.search(self.said().decode("utf-8", "replace"))
        return Path(found[1]) if found else None

    def last_error(self) -> str:
        """The last message that begins with `error:`, else the last line."""
        lines = self.said().decode("utf-8", "replace").strip().splitlines()
        errors = [i for i, line in enumerate(lines) if line.startswith("error:")]
        return "\n".join(lines[errors[-1] :] if errors else lines[-1:])

    def keep_log_in(self, logs_dir: Path) -> None:
        """Move the log, while it is being written, to where the run keeps its logs."""
        target = logs_dir / "train.log"
        os.replace(self.log, target)
        self.log = target


def start(arguments: Sequence[str], log: Path) -> Detached:
    """Start `miles ARGUMENTS` in a session of its own: neither Ctrl-C nor a closed terminal reaches it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "miles_cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Detached(process, log)


def starting_log(runs_dir: Path) -> Path:
    """A log for a run that has no directory yet, on the same disk."""
    return runs_dir / f".starting-{os.getpid()}.log"
