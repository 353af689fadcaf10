"""Runs that were submitted to a cluster, as `miles runs` meets them: refreshed, stopped, waited for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from miles.record import RunReader, RunStatus, post_request

if TYPE_CHECKING:
    from miles.orchestration.submission import Submission

STOP_POLL_SECONDS = 0.2
JOB_POLL_SECONDS = 1.0
OPEN = (RunStatus.RUNNING, RunStatus.EMPTY, RunStatus.DEAD)
"""What a mirror may show of a job that goes on: its last heartbeat may have come a while ago."""


def is_submitted(run_dir: Path) -> bool:
    """Whether the run is a job on a cluster; reads meta.json only."""
    return "submission" in RunReader(run_dir, read=False).meta


def bring_up_to_date(run_dir: Path) -> bool:
    """Fetch what a submitted run has recorded since, where that is not in its directory already.

    False: another process is about it, and may not be done.
    """
    if is_submitted(run_dir) and RunReader(run_dir, read=False).status() in OPEN:
        from miles.orchestration.submission import refresh

        return refresh(run_dir)
    return True


def ask_to_stop(run_dir: Path, by: str) -> str:
    """Leave a stop request in the run directory, or with the cluster that runs the job; returns its id."""
    job = _elsewhere(run_dir)
    if job is None:
        return post_request(run_dir, "stop", by=by).id
    from miles.orchestration.submission import stop_job

    stop_job(job)
    return job.id


def wait_for_end(run_dir: Path) -> RunStatus:
    """Block until the run has ended; returns how."""
    job = _elsewhere(run_dir)
    if job is not None:
        _wait_for_job(job)
        # The launcher may still be bringing home how it ended.
        while not bring_up_to_date(run_dir):
            time.sleep(STOP_POLL_SECONDS)
        return RunReader(run_dir, read=False).status()
    reader = RunReader(run_dir, read=False)
    while not (status := reader.status()).ended:
        time.sleep(STOP_POLL_SECONDS)
    return status


def _wait_for_job(job: Submission) -> None:
    from miles.orchestration.submission import job_ended

    while not job_ended(job):
        time.sleep(JOB_POLL_SECONDS)


def _elsewhere(run_dir: Path) -> Submission | None:
    """The job of a run whose control inbox is out of reach; None where the run reads this directory."""
    if not is_submitted(run_dir):
        return None
    from miles.orchestration.submission import Submission

    job = Submission.of(run_dir)
    return None if job is None or job.shared else job
