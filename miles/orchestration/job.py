"""One attempt at a run: what it is told, where it is written down and how it ended; torch stays unloaded."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from miles import environment
from miles._version import __version__
from miles.config import ResolvedConfig, config_hash, dump_toml, to_json
from miles.errors import ExitCode, MilesError, RunError
from miles.orchestration.checkpoint_sources import CheckpointSource
from miles.orchestration.checkpoints import CheckpointStore
from miles.orchestration.lineage import RESTART, Lineage
from miles.planning import Plan
from miles.record import RunLayout, Summary, create_run_dir
from miles.record.json_file import replace_file

KEPT_META = ("submission", "parent")
"""Entries of meta.json that every attempt keeps."""


@dataclass(frozen=True)
class Job:
    """One attempt at a run: what to do and where to write it down."""

    resolved: ResolvedConfig
    plan: Plan
    source: CheckpointSource
    run_dir: Path
    attempt: int = 1
    resume_from: Path | None = None
    """A checkpoint directory; None starts at step 0."""
    in_cluster: bool = False
    """This process drives a job on a Ray cluster: workers start there, not in a runtime of our own."""
    lineage: Lineage = field(default_factory=Lineage)

    @property
    def checkpoint_root(self) -> Path:
        """Where the run's checkpoints lie."""
        return checkpoint_root(self.resolved, self.run_dir)

    def next_attempt(self) -> Job:
        """The same run again, from its newest checkpoint, in the same process."""
        latest = CheckpointStore(self.checkpoint_root).latest()
        # A checkpoint written since holds the settings of this attempt; an older one has to be told again.
        changes = self.lineage.changes if latest == self.resume_from else {}
        lineage = Lineage(RESTART, changes)
        return replace(self, attempt=self.attempt + 1, resume_from=latest, lineage=lineage)


@dataclass(frozen=True)
class RunOutcome:
    """How an attempt ended. `error` is the user's mistake that ended it, if one did."""

    run_dir: Path
    summary: Summary
    exit_code: ExitCode
    error: MilesError | None = None


def checkpoint_root(resolved: ResolvedConfig, run_dir: Path) -> Path:
    """Where a run's checkpoints lie."""
    save = resolved.config.checkpoint.save
    return Path(save) if save else RunLayout(run_dir).checkpoints_dir


def new_run_dir(resolved: ResolvedConfig) -> Path:
    """A fresh run directory, named after the run, else after its profile (a name, or the path of a file).

    Raises RunError when it cannot be made.
    """
    name = resolved.config.run.name or Path(resolved.profile or "run").stem
    if "/" in name:
        raise RunError(
            "a run is named by one directory, without a /",
            where=f"--run-name {name}",
            fix=f"--run-name {name.rpartition('/')[2]}; where runs go is said by --runs-dir",
        )
    return create_run_dir(resolved.config.run.runs_dir or environment.runs_dir(), name)


def write_identity(
    run_dir: Path, resolved: ResolvedConfig, plan: Plan, attempt: int = 1, **more: Any
) -> None:
    """What an attempt was told: config (for people and for programs), plan and origin of the code."""
    layout = RunLayout(run_dir)
    layout.make()
    config = resolved.config
    replace_file(layout.config_toml, dump_toml(resolved).encode())
    replace_file(layout.config_json, to_json(resolved).encode())
    replace_file(layout.plan, (json.dumps(plan.as_dict(), indent=1, default=str) + "\n").encode())
    kept = {key: value for key, value in read_meta(run_dir).items() if key in KEPT_META}
    meta = {
        "id": run_dir.resolve().name,
        "profile": resolved.profile,
        "name": config.run.name,
        "seed": config.run.seed,
        "code_version": __version__,
        "config_hash": config_hash(config),
        "python": platform.python_version(),
        "command": sys.argv,
        "attempt": attempt,
        "started": time.time(),
    }
    write_meta(run_dir, kept | meta | more)


def write_meta(run_dir: Path, meta: Mapping[str, Any]) -> None:
    """meta.json, which others may be reading."""
    replace_file(RunLayout(run_dir).meta, (json.dumps(dict(meta), indent=1) + "\n").encode())


def read_meta(run_dir: Path) -> dict[str, Any]:
    """meta.json; empty while there is none."""
    path = RunLayout(run_dir).meta
    if not path.is_file():
        return {}
    meta: dict[str, Any] = json.loads(path.read_text())
    return meta
