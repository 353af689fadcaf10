"""Without a terminal the dashboard does not start: a Textual program would hang there."""

from __future__ import annotations

import subprocess
import sys

from frames import RUN

REFUSED = """
import sys
from pathlib import Path
from miles.errors import Unavailable
from miles_cli.dashboard.app import run_dashboard
try:
    run_dashboard([Path(sys.argv[1])])
except Unavailable as error:
    print(error)
print(sorted(name for name in sys.modules if name.split(".")[0] == "textual"))
"""


def test_no_terminal_no_dashboard_and_no_textual() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, str(RUN)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert "needs a terminal" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
    assert "\x1b" not in done.stdout + done.stderr
