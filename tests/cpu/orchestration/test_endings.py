"""How a run ends: stopped too late to matter, told that it was heard, or before it had weights."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from miles.config import resolve
from miles.errors import ExitCode, RunError, Unavailable
from miles.orchestration import launch
from miles.orchestration.checkpoint_sources import locate_checkpoint
from miles.orchestration.job import Job, RunOutcome
from miles.orchestration.lineage import Lineage
from miles.orchestration.observer import SilentObserver
from miles.orchestration.supervisor import Supervisor
from miles.orchestration.watch import Watch
from miles.record import History, RecordWriter, RunStatus, summarise


class TinyExecutor:
    """A run of two steps whose only work is to hear of a stop in one of them."""

    def __init__(self, stopped_in: int, supervisor: Supervisor) -> None:
        self.stopped_in, self.supervisor, self.complete = stopped_in, supervisor, False
        self.watch: Watch | None = None
        self.saved = False

    @asynccontextmanager
    async def driver(self, *_: Any) -> AsyncIterator[TinyExecutor]:
        yield self

    async def finish_saving(self) -> None:
        self.saved = True

    async def stall(self, _: Any) -> None:
        await asyncio.Event().wait()

    async def turn(self, _: Any) -> None:
        for step in (1, 2):
            if step == self.stopped_in:
                self.supervisor.request_stop("interrupted")
            self.complete = step == 2
            if self.supervisor.stop_status is not None:
                return


@pytest.mark.parametrize(("step", "status"), [(1, RunStatus.INTERRUPTED), (2, RunStatus.FINISHED)])
def test_a_stop_in_the_last_step_left_nothing_out(
    step: int, status: RunStatus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = Supervisor()
    executor = TinyExecutor(step, supervisor)
    monkeypatch.setattr(launch, "loop_of", lambda _: executor.turn)
    job = SimpleNamespace(resolved=resolve("quickstart"), run_dir=tmp_path, attempt=1, lineage=Lineage())
    with RecordWriter(tmp_path) as record:
        ending = launch._attempt(
            cast(Job, job), cast(launch.Executor, executor), record, supervisor, SilentObserver()
        )
    assert ending.status is status


def test_a_run_that_waits_for_an_engine_which_cannot_be_replaced_ends_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request may find out: all of them wait."""

    async def watch() -> None:
        raise Unavailable("engine-1 was lost, and no other could be started in its place")

    executor = TinyExecutor(0, supervisor := Supervisor())
    executor.watch = watch
    monkeypatch.setattr(launch, "loop_of", lambda _: executor.stall)
    job = SimpleNamespace(resolved=resolve("quickstart"), run_dir=tmp_path, attempt=1, lineage=Lineage())
    with RecordWriter(tmp_path) as record:
        ending = launch._attempt(
            cast(Job, job), cast(launch.Executor, executor), record, supervisor, SilentObserver()
        )
        outcome = launch._end(cast(Job, job), ending, record, History(), supervisor, 1.0)
    assert outcome.exit_code is ExitCode.UNAVAILABLE and "engine-1" in str(outcome.error)
    assert executor.saved, "a checkpoint on its way is completed"


def test_an_attempt_is_copied_to_the_trackers_that_it_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[tuple[Path, int]] = []
    monkeypatch.setattr(launch, "follow", lambda run_dir, attempt: copied.append((run_dir, attempt)))
    executor = TinyExecutor(0, supervisor := Supervisor())
    monkeypatch.setattr(launch, "loop_of", lambda _: executor.turn)
    job = SimpleNamespace(resolved=resolve("quickstart"), run_dir=tmp_path, attempt=2, lineage=Lineage())
    with RecordWriter(tmp_path, attempt=2) as record:
        launch._attempt(cast(Job, job), cast(launch.Executor, executor), record, supervisor, SilentObserver())
        assert copied == [(tmp_path, 2)]
        monkeypatch.setattr(launch, "follow", _no_tracker)
        ending = launch._attempt(
            cast(Job, job), cast(launch.Executor, executor), record, supervisor, SilentObserver()
        )
        outcome = launch._end(cast(Job, job), ending, record, History(), supervisor, 1.0)
    assert ending.status is RunStatus.FAILED and "wandb" in str(outcome.error)
    assert outcome.exit_code is ExitCode.UNAVAILABLE, "what was missing is not a failure of the run"


def _no_tracker(run_dir: Path, attempt: int) -> None:
    raise Unavailable("the package wandb is not installed")


def test_the_first_signal_is_told_and_the_second_interrupts() -> None:
    heard = threading.Event()
    supervisor = Supervisor(heard.set)
    with supervisor.signals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard.wait(30) and supervisor.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_an_interrupted_warm_start_names_no_directory_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(recipe: Any, plan: Any, run_dir: Path, observer: Any) -> RunOutcome:
        run_dir.mkdir()
        summary = summarise(History(), RunStatus.INTERRUPTED, 1.0, "c0ffee")
        return RunOutcome(run_dir, summary, ExitCode.TERMINATED, None)

    monkeypatch.setenv("MILES_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launch, "run", interrupted)
    with pytest.raises(RunError, match="the warm start was interrupted after 0 of 250 steps") as ended:
        locate_checkpoint(resolve("quickstart"), SilentObserver())
    assert ended.value.exit_code is ExitCode.TERMINATED
    assert str(tmp_path) not in str(ended.value) and not list((tmp_path / "checkpoints").iterdir())
