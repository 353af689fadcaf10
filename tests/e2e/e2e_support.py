"""Real runs through the command line, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miles.record import RunReader

SMALL = (
    *("--profile", "quickstart", "--num-rollout", "12"),
    *("--rollout-batch-size", "8", "--n-samples-per-prompt", "4", "--save-interval", "3"),
    *("--eval-prompt-data", "sort", "builtin:sort/test@[0:32]"),
)
"""A run of a few seconds that still uses every part of the ring."""


@dataclass
class Cli:
    """Runs `miles` with its own cache and runs directory."""

    cache: Path
    runs: Path
    _processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        return kept | {"MILES_CACHE_DIR": str(self.cache), "MILES_RUNS_DIR": str(self.runs)}

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "miles_cli", *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        self._processes.append(process)
        return process

    def __call__(
        self, *arguments: str, timeout: float = 300, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def kill_leftovers(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()

    def only_run(self) -> Path:
        (run,) = [path for path in self.runs.iterdir() if path.is_dir()]
        return run

    def wait_until(
        self, condition: Callable[[], bool], process: subprocess.Popen[str], timeout: float = 120
    ) -> None:
        """Wait for something that a live process does; a process that ended first fails the test."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert process.poll() is None, f"ended early: {process.communicate()}"
            assert time.monotonic() < deadline, f"it did not happen within {timeout:g} s"
            time.sleep(0.005)


def metrics_of(run: Path) -> dict[int, dict[str, float]]:
    """Every metric of every step but timings: what must not depend on when a run was interrupted."""
    return {
        row.step: {name: value for name, value in row.metrics.items() if not name.startswith("perf/")}
        for row in RunReader(run).rows()
    }


def summary_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return content
