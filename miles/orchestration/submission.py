"""Submit a run to a Ray cluster as a job, follow it, and end as it ends."""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGINT
from typing import Any

from miles.config import ResolvedConfig
from miles.errors import ExitCode, MilesError, RunError, Unavailable
from miles.orchestration.job import RunOutcome, new_run_dir, read_meta, write_identity, write_meta
from miles.orchestration.job_order import ORDER_FILE, write_order
from miles.orchestration.job_wire import WireReader
from miles.orchestration.observer import Observer
from miles.orchestration.ray_environment import load_ray, prepare_client
from miles.orchestration.record_stream import Mirror
from miles.orchestration.supervisor import Supervisor
from miles.planning import Plan
from miles.planning.facts.cluster import auth_headers, job_server, probe
from miles.record import RunReader
from miles.record.summary import read_summary

STOP_WAIT_SECONDS = 600
"""What a stopped job gets to finish its step and save; Ray's own default is 3 seconds."""
ENTRYPOINT = f"exec python -m miles.orchestration.job_entry {ORDER_FILE}"
"""`python` of the cluster's environment, which has miles installed."""
POLL_SECONDS = 0.5
TALK_KEPT = 20


@dataclass
class Submission:
    """A job and the run directory that shows it here; kept in meta.json."""

    address: str
    id: str
    shared: bool | None = None
    """Whether the job writes into this run directory itself; None until it has said so."""
    run_dir: str | None = None
    """The run directory that the job writes, on the cluster."""

    @classmethod
    def of(cls, run_dir: Path) -> Submission | None:
        """The submission behind a run directory; None for a run of this machine."""
        fields = read_meta(run_dir).get("submission")
        return None if fields is None else cls(**fields)

    def keep(self, run_dir: Path) -> None:
        """Write it into meta.json."""
        meta = read_meta(run_dir) | {"submission": dict(vars(self))}
        write_meta(run_dir, meta)


def submit(resolved: ResolvedConfig, plan: Plan, observer: Observer, share_files: bool = True) -> RunOutcome:
    """Submit a new run and see it to its end. Raises: Unavailable, and what ended the job before it ran."""
    address = _address(resolved)
    client = job_client(address)
    run_dir = new_run_dir(resolved).resolve()
    write_identity(run_dir, resolved, plan)
    submission = Submission(address, run_dir.name)
    return _start(client, submission, run_dir, resolved, plan, observer, share_files)


def resubmit(
    run_dir: Path,
    resolved: ResolvedConfig,
    plan: Plan,
    observer: Observer,
    *,
    from_step: int | None = None,
    sets: Sequence[str] = (),
    by: str = "cli",
) -> RunOutcome:
    """Go on with a run that was submitted, where it was submitted or at a changed cluster.address."""
    previous = Submission.of(run_dir)
    assert previous is not None, "only submitted runs are resubmitted"
    address = _address(resolved)
    client = job_client(address)
    refresh(run_dir)
    attempt = max(RunReader(run_dir).attempt, 1) + 1
    if previous.shared is False:
        write_identity(run_dir, resolved, plan, attempt)
    # The time tells two submissions apart of which the first never began.
    id = f"{run_dir.name}-attempt-{attempt}-{time.strftime('%H%M%S')}"
    submission = Submission(address, id, previous.shared, previous.run_dir)
    return _start(
        client,
        submission,
        run_dir.resolve(),
        resolved,
        plan,
        observer,
        share_files=previous.shared is not False,
        resume=True,
        from_step=from_step,
        sets=list(sets),
        by=by,
        cluster_run_dir=previous.run_dir if previous.shared is False else None,
        have=Mirror(run_dir).holds(),
    )


def job_client(address: str) -> Any:
    """Ray's client of a job server. Raises: Unavailable."""
    prepare_client()
    load_ray()
    probe(address)
    from ray.dashboard.modules import dashboard_sdk
    from ray.dashboard.modules.job import sdk
    from ray.job_submission import JobSubmissionClient

    for module in (dashboard_sdk, sdk):
        logging.getLogger(module.__name__).setLevel(logging.WARNING)

    try:
        return JobSubmissionClient(address, headers=auth_headers())
    except (RuntimeError, ConnectionError) as error:
        raise Unavailable("the job server refused the connection", where=address, why=_first(error)) from None


def refresh(run_dir: Path) -> bool:
    """Bring the mirror of a submitted run up to date from its job's log. False: another process does so.

    A cluster that does not answer leaves the mirror as it is.
    """
    submission = Submission.of(run_dir)
    if submission is None or submission.shared:
        return True
    mirror = Mirror(run_dir)
    with mirror.exclusive() as alone:
        if not alone:
            return False
        try:
            log = job_client(submission.address).get_job_logs(submission.id)
        except (Unavailable, RuntimeError):
            return True
        following = _Following(submission, mirror, None)
        following.take_in(log)
    return True


def stop_job(submission: Submission) -> None:
    """Ask the cluster to stop the job: it finishes its step, saves and ends. Raises: Unavailable."""
    client = job_client(submission.address)
    try:
        client.stop_job(submission.id)
    except RuntimeError as error:
        raise Unavailable(
            "the job could not be stopped", where=submission.address, why=_first(error)
        ) from None


def job_ended(submission: Submission) -> bool:
    """Whether the job has come to its end. Raises: Unavailable."""
    return bool(job_client(submission.address).get_job_status(submission.id).is_terminal())


def _start(
    client: Any,
    submission: Submission,
    run_dir: Path,
    resolved: ResolvedConfig,
    plan: Plan,
    observer: Observer,
    share_files: bool,
    **order: Any,
) -> RunOutcome:
    submission.keep(run_dir)
    with tempfile.TemporaryDirectory(prefix="miles-stage-") as stage:
        write_order(Path(stage), resolved, run_dir, share_files, **order)
        try:
            client.submit_job(
                entrypoint=ENTRYPOINT,
                submission_id=submission.id,
                runtime_env={
                    "working_dir": stage,
                    "env_vars": {
                        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_SECONDS),
                        "PYTHONUNBUFFERED": "1",
                    },
                },
                metadata={"miles.run": run_dir.name, "miles.profile": str(resolved.profile)},
                entrypoint_num_cpus=1,
            )
        except RuntimeError as error:
            raise Unavailable(
                "the cluster refused the job", where=submission.address, why=_first(error)
            ) from None
    observer.on_event("submitted", {"address": submission.address, "id": submission.id})
    observer.on_event("run", {"run_dir": str(run_dir), "attempt": 1})
    mirror = Mirror(run_dir)
    following = _Following(submission, mirror, observer)
    supervisor = Supervisor()
    with mirror.exclusive(), supervisor.signals():
        info = asyncio.run(_follow(client, following, supervisor))
    return _outcome(run_dir, following, info, supervisor)


@dataclass
class _Following:
    """Sorts what a job says: record lines into the mirror, events and steps to the observer, talk aside."""

    submission: Submission
    mirror: Mirror
    observer: Observer | None
    reader: WireReader = field(default_factory=WireReader)
    talk: list[str] = field(default_factory=list)
    ending: Mapping[str, Any] | None = None

    def take_in(self, text: str) -> None:
        for item in self.reader.feed(text):
            if isinstance(item, str):
                self._talk(item)
            else:
                self._message(item)

    def _message(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind in ("append", "replace"):
            self.mirror.apply(message)
        elif kind == "place":
            self.submission.shared, self.submission.run_dir = message["shared"], message["run_dir"]
            self.submission.keep(self.mirror.run_dir)
        elif kind == "outcome":
            self.ending = message
        elif self.observer is not None and kind == "step":
            self.observer.on_step(message["row"])
        elif self.observer is not None and kind == "event" and message["name"] != "run":
            self.observer.on_event(message["name"], message["fields"])

    def _talk(self, line: str) -> None:
        self.talk = [*self.talk[1 - TALK_KEPT :], line]
        if self.observer is not None:
            self.observer.on_event("job_log", {"line": line})


async def _follow(client: Any, following: _Following, supervisor: Supervisor) -> Any:
    """Read the log until the job has ended; a wish to stop is passed on once."""
    id = following.submission.id
    passing_on = asyncio.create_task(_pass_on_stop(client, id, supervisor))
    try:
        while True:
            await _tail(client, id, following)
            info = await asyncio.to_thread(client.get_job_info, id)
            if info.status.is_terminal():
                break
            await asyncio.sleep(POLL_SECONDS)
    finally:
        passing_on.cancel()
    log = await asyncio.to_thread(client.get_job_logs, id)
    following.take_in(log[following.reader.consumed :])
    return info


async def _tail(client: Any, id: str, following: _Following) -> None:
    """Follow the log from where we are; returns when the connection ends, whatever the reason."""
    from aiohttp import ClientError

    skip = following.reader.consumed
    try:
        async for chunk in client.tail_job_logs(id):
            following.take_in(chunk[skip:])
            skip = max(0, skip - len(chunk))
    except (ClientError, RuntimeError, ConnectionError):
        # The job is asked for its status next; a connection that broke is made again.
        return


async def _pass_on_stop(client: Any, id: str, supervisor: Supervisor) -> None:
    while supervisor.stop_status is None:
        await asyncio.sleep(POLL_SECONDS)
    await asyncio.to_thread(client.stop_job, id)


def _outcome(run_dir: Path, following: _Following, info: Any, supervisor: Supervisor) -> RunOutcome:
    """The job's ending as if the run had ended here. Raises: its error, when it ended before it ran."""
    ending = following.ending or {"exit_code": info.driver_exit_code, "error": None}
    fields = ending["error"]
    error: MilesError | None = RunError(**fields) if fields else None
    code = _exit_code(ending["exit_code"])
    if following.ending is None and error is None:
        talk = [line for line in following.talk if line.strip()]
        error = RunError(
            f"the job ended as {info.status.value}",
            where=f"{following.submission.id} at {following.submission.address}",
            why=talk[-1] if talk else str(info.message),
            fix=f"its log: {run_dir}/logs, or: ray job logs --address {following.submission.address} "
            f"{following.submission.id}",
        )
    if supervisor.signal is not None:
        code = ExitCode.INTERRUPTED if supervisor.signal == SIGINT else ExitCode.TERMINATED
    summary = read_summary(run_dir)
    if summary is None:
        failed = error or RunError("the job ended without a summary", where=str(run_dir))
        failed.exit_code = code if code is not ExitCode.OK else ExitCode.FAILED
        raise failed
    return RunOutcome(run_dir, summary, code, error)


def _exit_code(code: int | None) -> ExitCode:
    """The job's exit code; one that miles does not give (a kill, a missing program) is a failure."""
    return ExitCode(code) if code in set(ExitCode) else ExitCode.FAILED


def _address(resolved: ResolvedConfig) -> str:
    cluster = resolved.config.cluster
    assert cluster.address is not None, "a run without cluster.address is not submitted"
    return job_server(cluster.address, cluster.ray_dashboard_port)


def _first(error: Exception) -> str:
    """The last line that says something: Ray sends whole tracebacks of its server."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" .^~")]
    return lines[-1] if lines else type(error).__name__
