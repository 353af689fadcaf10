"""The recorded run that the tests look at, and a dashboard on it."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from miles.record.heartbeat import process_start
from miles.record.json_file import read_json, write_json
from miles_cli.dashboard.feed import RunFeed
from miles_cli.dashboard.scene import Scene
from miles_cli.dashboard.symbols import BRAILLE
from miles_cli.dashboard.view import View

sys.path.insert(0, str(Path(__file__).parent))
from frames import RUN, at_rest
from started import Started


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Log lines show local time; the golden frames were drawn in UTC."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture(autouse=True)
def quick_pilot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pilot asks in slices of 20 ms whether the program is idle; with hundreds of keys that adds up."""
    monkeypatch.setattr("textual._wait.SLEEP_GRANULARITY", 0.004)
    monkeypatch.setattr("textual._wait.SLEEP_IDLE", 0.0004)


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> list[Started]:
    """The processes that a dashboard has started. None is: tests/e2e/test_fixes.py starts real ones."""
    processes: list[Started] = []

    def start(arguments: list[str], log: Path) -> Started:
        processes.append(Started(arguments, log))
        return processes[-1]

    monkeypatch.setattr("miles_cli.detached.start", start)
    return processes


@pytest.fixture(autouse=True)
def in_its_runs_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands on the screen name the recorded run by its id, wherever the checkout lies."""
    monkeypatch.setenv("MILES_RUNS_DIR", str(RUN.parent))


@pytest.fixture
def scene() -> Scene:
    """The recorded run two seconds after its last event."""
    run = RunFeed(RUN).snapshot()
    return Scene((run,), 0, View(), at_rest(), BRAILLE)


@pytest.fixture
def live_run(tmp_path: Path) -> Path:
    """A copy of the recorded run that looks alive: no summary, and a heartbeat of this very process."""
    run = tmp_path / "live"
    shutil.copytree(RUN, run)
    (run / "summary.json").unlink()
    path = run / "heartbeat" / "driver.json"
    alive = {"pid": os.getpid(), "host": socket.gethostname(), "process_start": process_start(os.getpid())}
    write_json(path, read_json(path) | alive)
    return run
