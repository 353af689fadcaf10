"""Real runs through the command line, each in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import preloaded
import psutil

from miles.record import RunReader

SMALL = (
    *("--profile", "quickstart", "--num-rollout", "12"),
    *("--rollout-batch-size", "8", "--n-samples-per-prompt", "4", "--save-interval", "3"),
    *("--eval-prompt-data", "sort", "builtin:sort/test@[0:32]"),
)
"""A run of a few seconds that still uses every part of the ring."""
PATIENCE_S = 900.0
"""Until something that does not happen is a failure: a busy machine is none."""

NAMING_A_CHECKPOINT = ("miles.orchestration.checkpoints", "CheckpointStore.complete")
"""Where its files are written, and it has no name yet."""
RECORDING_A_STEP = ("miles.orchestration.driver", "Driver.finish_step")
"""Where it has been trained, and the record does not have it."""
SAMPLING = ("miles.orchestration.driver", "Driver.collect")
"""Where its prompts have not been given to the engines."""

EVEN = {"RAY_worker_niceness": "0"}
"""Ray's workers run at nice 15: beside other tests they would hardly run at all."""


@dataclass
class Cli:
    """Runs `miles` with its own cache and runs directory."""

    cache: Path
    runs: Path
    in_own_network: bool = field(default=False, kw_only=True)
    """Commands belong to the network namespace of this thread."""
    imported: Sequence[str] = field(default=preloaded.RUNS, kw_only=True)
    """What commands find imported."""
    _processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        return kept | EVEN | {"MILES_CACHE_DIR": str(self.cache), "MILES_RUNS_DIR": str(self.runs)}

    def start_until(self, pause: preloaded.Pause, *arguments: str) -> subprocess.Popen[str]:
        """A command that has stopped there; nothing but a signal ends it."""
        process: subprocess.Popen[str]
        process = preloaded.miles(arguments, self.environment, imported=self.imported, pause=pause)
        self._processes.append(process)
        self.wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED, process)
        return process

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        process = self._forked(arguments, **options) or subprocess.Popen(
            [sys.executable, "-m", "miles_cli", *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pipesize=preloaded.UNREAD,
            text=True,
            **options,
        )
        self._processes.append(process)
        return process

    def _forked(
        self, arguments: Sequence[str], cwd: Path | None = None, **options: Any
    ) -> subprocess.Popen[str] | None:
        """The same without the time that imports take, where that can be."""
        can_be = sys.platform == "linux" and not self.in_own_network and not options
        return preloaded.miles(arguments, self.environment, cwd, self.imported) if can_be else None

    def __call__(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **options)
        out, err = self.outcome(process)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def outcome(self, process: subprocess.Popen[str]) -> tuple[str, str]:
        """What a process wrote until its end; one that does not end is killed and fails the test."""
        try:
            return process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            standing = self.standing()
            process.kill()
            raise AssertionError(f"{process.args} did not end: {process.communicate()}\n{standing}") from None

    def kill(self, process: subprocess.Popen[str]) -> None:
        """`kill -9`; whatever it had started ends as well."""
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        left = psutil.wait_procs(started, timeout=PATIENCE_S)[1]
        assert not left, f"outlived it: {left}"

    def kill_leftovers(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()

    def only_run(self) -> Path:
        (run,) = [path for path in self.runs.iterdir() if path.is_dir()]
        return run

    def wait_until(self, condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
        """Wait for something that a live process does; a process that ended first fails the test."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert process.poll() is None, f"ended early: {process.communicate()}"
            assert time.monotonic() < deadline, f"not within {PATIENCE_S:g} s\n{self.standing()}"
            time.sleep(0.02)

    def standing(self) -> str:
        """How every run stands, and what its processes have said last."""
        told = []
        for run in sorted(path.parent for path in self.runs.glob("*/events")):
            reader = RunReader(run)
            phases = [(phase.writer, phase.name, phase.step) for phase in reader.history.open_phases()]
            told.append(f"{run.name}: {reader.status()}, step {reader.history.last_step}, in {phases}")
            for log in sorted((run / "logs").glob("*.log")):
                last = log.read_text(errors="replace").splitlines()[-5:]
                told += [f"{log.name}: {line}" for line in last]
        return "\n".join(told)


def copy_kernels(cache: Path, target: Path) -> None:
    """Into the cache `target`, the kernels that `cache` has; others may be building more there."""
    if (cache / "kernels").is_dir():
        under_way = shutil.ignore_patterns(".building-*")
        shutil.copytree(cache / "kernels", target / "kernels", ignore=under_way, dirs_exist_ok=True)


def metrics_of(run: Path) -> dict[int, dict[str, float]]:
    """Every metric of every step but timings: what must not depend on when a run was interrupted."""
    return {
        row.step: {name: value for name, value in row.metrics.items() if not name.startswith("perf/")}
        for row in RunReader(run).rows()
    }


def summary_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return content
