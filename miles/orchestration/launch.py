"""Start, restart and end a run: `miles train`, `miles runs resume` and submitted jobs come through here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM
from typing import Any, Protocol

from miles.config import ResolvedConfig, config_hash
from miles.errors import ExitCode, MilesError, RunError
from miles.exporters.follow import follow
from miles.orchestration.checkpoint_sources import locate_checkpoint
from miles.orchestration.checkpoints import CheckpointStore
from miles.orchestration.decode_kernel import settle
from miles.orchestration.driver import Driver
from miles.orchestration.garbage import long_lived_objects_kept
from miles.orchestration.job import Job, RunOutcome, new_run_dir, write_identity
from miles.orchestration.lineage import Lineage
from miles.orchestration.loop import loop_of
from miles.orchestration.observer import Observer, SilentObserver
from miles.orchestration.supervisor import Supervisor
from miles.orchestration.watch import watched
from miles.orchestration.worker_loss import WorkerLost
from miles.planning import Plan
from miles.record import (
    History,
    Inbox,
    RecordWriter,
    RunReader,
    RunStatus,
    summarise,
    write_summary,
)


class Executor(Protocol):
    """Where the workers of a run live. It outlasts the attempts, which come one after the other."""

    def driver(
        self, job: Job, record: RecordWriter, supervisor: Supervisor, observer: Observer
    ) -> AbstractAsyncContextManager[Driver]:
        """The driver of one attempt; its workers end with the context."""

    def close(self) -> None:
        """End what the executor started."""


def run(
    resolved: ResolvedConfig,
    plan: Plan,
    *,
    run_dir: Path | None = None,
    observer: Observer | None = None,
    in_cluster: bool = False,
    lineage: Lineage | None = None,
) -> RunOutcome:
    """Start a new run, in a directory of its own, and see it to its end.

    A built-in checkpoint is warm-started on first use. Raises: a MilesError when that ends early.
    """
    observer, lineage = observer or SilentObserver(), lineage or Lineage()
    source = locate_checkpoint(resolved, observer)
    run_dir = (run_dir or new_run_dir(resolved)).resolve()
    plan = settle(plan, observer, source.directory)
    job = Job(resolved, plan, source, run_dir, in_cluster=in_cluster, lineage=lineage)
    more: dict[str, Any] = {} if lineage.parent is None else {"parent": lineage.parent}
    write_identity(run_dir, resolved, plan, **more)
    return run_job(job, observer)


def run_job(job: Job, observer: Observer) -> RunOutcome:
    """See a run to its end, through as many attempts as lost workers and the run file allow.

    A MilesError comes back in the outcome. Raises whatever else went wrong, after recording it.
    """
    started = time.monotonic()
    history = RunReader(job.run_dir).history if job.attempt > 1 else History()
    supervisor = Supervisor(lambda: observer.on_event("stopping", {}))
    restarts = job.resolved.config.fault_tolerance.max_worker_restarts
    with supervisor.signals(), _executor(job) as executor:
        while True:
            with _record(job, history) as record:
                ending = _attempt(job, executor, record, supervisor, observer)
                if ending.lost is not None:
                    _hear_stop(record, supervisor)
                if ending.lost is None or restarts == 0 or supervisor.stop_status is not None:
                    return _end(job, ending, record, history, supervisor, time.monotonic() - started)
                job, restarts = job.next_attempt(), restarts - 1
                _announce_restart(ending.lost, job, record, observer)


@dataclass
class _Ending:
    """How one attempt ended; `crash` is a defect, which travels on after it is recorded."""

    status: RunStatus = RunStatus.FAILED
    error: MilesError | None = None
    lost: WorkerLost | None = None
    crash: BaseException | None = None


def _attempt(
    job: Job, executor: Executor, record: RecordWriter, supervisor: Supervisor, observer: Observer
) -> _Ending:
    """One attempt; whatever ended it is in the record."""
    digest = config_hash(job.resolved.config)
    record.event("run_start", profile=job.resolved.profile, config_hash=digest, **job.lineage.as_fields())
    try:
        follow(job.run_dir, job.attempt)
        complete = asyncio.run(_drive(job, executor, record, supervisor, observer))
    except WorkerLost as lost:
        record.event("worker_dead", worker=lost.worker, reason=lost.reason)
        return _Ending(error=lost, lost=lost)
    except MilesError as caught:
        record.exception(caught)
        return _Ending(error=caught)
    except KeyboardInterrupt:
        return _Ending(RunStatus.INTERRUPTED)
    except BaseException as caught:
        record.exception(caught)
        return _Ending(crash=caught)
    # A stop that came too late to leave a step out changed nothing.
    stopped = None if complete else supervisor.stop_status
    return _Ending(RunStatus(stopped or RunStatus.FINISHED))


async def _drive(
    job: Job, executor: Executor, record: RecordWriter, supervisor: Supervisor, observer: Observer
) -> bool:
    """Whether the run made all of its steps."""
    observer.on_event("run", {"run_dir": str(job.run_dir), "attempt": job.attempt})
    if job.attempt > 1:
        # A run that never reached a checkpoint starts over: not even its step 0 is kept.
        resumed = -1 if job.resume_from is None else CheckpointStore.load_state(job.resume_from).step
        record.resume(resumed)
    async with executor.driver(job, record, supervisor, observer) as driver:
        with long_lived_objects_kept():
            try:
                async with watched(driver.watch):
                    await loop_of(job.resolved.config)(driver)
            except WorkerLost:
                raise
            except MilesError:
                await driver.finish_saving()
                raise
            return driver.complete


def _end(
    job: Job,
    ending: _Ending,
    record: RecordWriter,
    history: History,
    supervisor: Supervisor,
    seconds: float,
) -> RunOutcome:
    """Write the last words of the run."""
    record.event("run_end", status=ending.status.value, seconds=seconds, signal=supervisor.signal)
    digest = config_hash(job.resolved.config)
    summary = summarise(history, ending.status, seconds, digest, run={"id": job.run_dir.name})
    refused = None
    try:
        write_summary(job.run_dir, summary)
    except OSError as error:
        # A disk that refuses the summary does not hide how the run ended.
        refused = _unwritten(job.run_dir, error)
    if ending.crash is not None:
        raise ending.crash
    code = ending.error.exit_code if ending.error else _exit_code(ending.status, supervisor.signal)
    return RunOutcome(job.run_dir, summary, code, ending.error or refused)


def _unwritten(run_dir: Path, error: OSError) -> RunError:
    return RunError(
        f"the summary could not be written: {error.strerror or error}",
        where=str(run_dir),
        why="the record of the steps and the checkpoints before it are untouched",
        fix=f"free space, then look at the run: miles runs show {run_dir}",
    )


def _hear_stop(record: RecordWriter, supervisor: Supervisor) -> None:
    """A stop that was asked of an attempt which lost a worker ends the run; no other attempt begins."""
    inbox = Inbox(record)
    for request in inbox.pending():
        if request.action == "stop":
            supervisor.request_stop("stopped")
            inbox.acknowledge(request)


def _announce_restart(lost: WorkerLost, job: Job, record: RecordWriter, observer: Observer) -> None:
    step = 0 if job.resume_from is None else CheckpointStore.load_state(job.resume_from).step
    record.event("restart", worker=lost.worker, attempt_started=job.attempt, from_step=step)
    observer.on_event("restart", {"worker": lost.worker, "reason": lost.reason, "from_step": step})


def _exit_code(status: RunStatus, signal: int | None) -> ExitCode:
    if status is RunStatus.INTERRUPTED:
        return ExitCode.TERMINATED if signal == SIGTERM else ExitCode.INTERRUPTED
    return ExitCode.OK if status in (RunStatus.FINISHED, RunStatus.STOPPED) else ExitCode.FAILED


def _record(job: Job, history: History) -> RecordWriter:
    beat = job.resolved.config.record.heartbeat_interval
    return RecordWriter(job.run_dir, attempt=job.attempt, heartbeat_interval=beat, history=history)


@contextmanager
def _executor(job: Job) -> Iterator[Executor]:
    """The executor of the plan; what it started ends with the run, however that ends."""
    executor: Executor
    if job.plan.executor == "ray":
        from miles.orchestration.ray_executor import RayExecutor

        executor = RayExecutor(job.in_cluster)
    else:
        from miles.orchestration.inline_executor import InlineExecutor

        executor = InlineExecutor()
    try:
        yield executor
    finally:
        executor.close()
