"""The place of a worker process: its name, its log, its record; torch stays unloaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miles.orchestration.job import Job
from miles.record import RecordWriter, RunLayout


@dataclass(frozen=True)
class Post:
    """What a worker process must know of its place: its name in logs and records, and where to work."""

    name: str
    job: Job
    cwd: str
    gpus: tuple[str, ...] = ()
    """Numbers of the GPUs on its node that an engine shares with a trainer; empty: those that Ray gives."""
    server_args: Mapping[str, Any] = field(default_factory=dict)
    """Of a server that is a part of a larger one, beside the arguments of the plan."""


def take_post(post: Post) -> RecordWriter:
    """Make this process the named worker: directory, log, record and heartbeat."""
    if Path(post.cwd).is_dir():
        os.chdir(post.cwd)
    job = post.job
    layout = RunLayout(job.run_dir)
    layout.make()
    _log_to(layout.logs_dir / f"{post.name}.log")
    beat = job.resolved.config.record.heartbeat_interval
    record = RecordWriter(job.run_dir, writer=post.name, attempt=job.attempt, heartbeat_interval=beat)
    record.event("worker_start", worker=post.name, pid=os.getpid())
    return record


def _log_to(path: Path) -> None:
    """Send everything this process prints into its own log."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def whereabouts() -> tuple[int, str]:
    """The id of this process, and Ray's id of the node that it runs on."""
    import ray

    return os.getpid(), str(ray.get_runtime_context().get_node_id())
