"""Where each thing lies in a run directory: the one place that knows the names."""

from __future__ import annotations

import errno
import time
from pathlib import Path

from miles.errors import RunError

RECORD_VERSION = 1


class RunLayout:
    """Paths inside one run directory."""

    def __init__(self, run_dir: str | Path) -> None:
        self.root = Path(run_dir)
        self.meta = self.root / "meta.json"
        self.config_toml = self.root / "config.toml"
        self.config_json = self.root / "config.json"
        self.plan = self.root / "plan.json"
        self.summary = self.root / "summary.json"
        self.events_dir = self.root / "events"
        self.samples_dir = self.root / "samples"
        self.checkpoints_dir = self.root / "checkpoints"
        self.capsules_dir = self.root / "capsules"
        self.logs_dir = self.root / "logs"
        self.heartbeat_dir = self.root / "heartbeat"
        self.control_dir = self.root / "control"
        self.handled_dir = self.control_dir / "handled"

    def events(self, writer: str) -> Path:
        return self.events_dir / f"{writer}.jsonl"

    def heartbeat(self, writer: str) -> Path:
        return self.heartbeat_dir / f"{writer}.json"

    def stacks(self, writer: str) -> Path:
        return self.heartbeat_dir / f"{writer}.stacks"

    def samples(self, step: int) -> Path:
        return self.samples_dir / f"step-{step:06d}.jsonl"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints_dir / f"step-{step:06d}"

    def capsule(self, step: int) -> Path:
        return self.capsules_dir / f"step-{step:06d}"

    def make(self) -> None:
        """Create the directories. Raises RunError when the place cannot be written."""
        folders = (
            self.events_dir,
            self.samples_dir,
            self.checkpoints_dir,
            self.logs_dir,
            self.heartbeat_dir,
            self.handled_dir,
        )
        try:
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                "the run directory cannot be created",
                where=str(self.root),
                why=str(error.strerror),
                fix="choose a place you may write to with --runs-dir or MILES_RUNS_DIR",
            ) from error


def create_run_dir(runs_dir: str | Path, name: str) -> Path:
    """Make `<runs_dir>/<name>-<date>-<time>`, with a counter when it is taken, and its folders."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    parent = Path(runs_dir)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1000):
            path = parent / (stem if attempt == 0 else f"{stem}-{attempt + 1}")
            if not path.exists():
                path.mkdir()
                break
    except OSError as error:
        too_long = error.errno == errno.ENAMETOOLONG
        raise RunError(
            "the run directory cannot be created",
            where=str(parent),
            why=str(error.strerror),
            fix="give a shorter --run-name"
            if too_long
            else "choose a place you may write to with --runs-dir or MILES_RUNS_DIR",
        ) from error
    RunLayout(path).make()
    return path
