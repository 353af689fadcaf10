"""A fix under way: what was asked for, and what the run's record says came of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from miles.record import RunStatus, post_request
from miles_cli import detached
from miles_cli.dashboard import fixes
from miles_cli.dashboard.snapshot import RunSnapshot

GOOD, WAITING, FAILED = "good", "label", "critical"
BY = "watch"


@dataclass
class Mending:
    """Applies one remedy to one run. `look` is asked whenever there is news of the run."""

    remedy: fixes.Remedy
    path: str
    state: str = WAITING
    """WAITING, then GOOD or FAILED for ever."""
    text: str = ""

    @property
    def settled(self) -> bool:
        return self.state != WAITING

    def look(self, run: RunSnapshot) -> None:
        """Compare with how the run stands."""
        raise NotImplementedError

    def _say(self, state: str, text: str) -> None:
        self.state, self.text = state, text


@dataclass
class LiveChange(Mending):
    """A request in the control inbox, applied at a step boundary. Raises RunError when it cannot be left."""

    _request: str = ""

    def __post_init__(self) -> None:
        patch = dict(self.remedy.patch)
        self._request = post_request(self.path, "set", by=BY, patch=patch).id
        self._say(WAITING, "asked the run; it answers at the next step boundary")

    def look(self, run: RunSnapshot) -> None:
        answer = next((event for event in run.controls if event["request"] == self._request), None)
        if answer is None:
            if run.status.ended:
                self._say(FAILED, f"the run is {run.status}: it ended before it heard of this")
            return
        at = f" after step {answer['step']}" if "step" in answer else ""
        if answer["state"] == "applied":
            self._say(GOOD, f"applied{at}: {fixes.told(self.remedy)}")
        else:
            self._say(FAILED, f"{answer['state']}{at}: {answer.get('why', '')}")


@dataclass
class GoBack(Mending):
    """`miles runs resume --stop` in a process of its own: it is done even if the dashboard is closed."""

    attempt: int = 0
    """The attempt that is left behind."""
    _process: detached.Detached = field(init=False)

    def __post_init__(self) -> None:
        log = Path(self.path) / "logs" / f"resume-{self.attempt + 1}.log"
        words = ["runs", "resume", self.path, "--stop", "--by", BY]
        self._process = detached.start([*words, *fixes.options(self.remedy)], log)
        self._say(WAITING, "the run ends its step and saves; then it goes on from the checkpoint")

    def look(self, run: RunSnapshot) -> None:
        # An attempt begins before it has loaded its checkpoint: only `resume` says where it goes on.
        attempt = max(run.resumes, default=0)
        if attempt > self.attempt:
            step, told = max(0, run.resumes[attempt]), fixes.told(self.remedy)
            self._say(GOOD, f"attempt {attempt} goes on from step {step}: {told}")
        elif self._process.exit_code not in (None, 0):
            self._say(FAILED, self._process.last_error())
        elif run.status.ended:
            self.text = "the run has ended; the next attempt is being set up"


@dataclass
class StartOver(Mending):
    """A new run from the run file of this one, which is stopped first. `show` gets its directory."""

    show: Callable[[Path], None] = print
    _process: detached.Detached | None = None

    def __post_init__(self) -> None:
        self._say(WAITING, "a new run is being set up; it has its own directory")

    def stop(self) -> None:
        """Ask the run to stop. Raises RunError when the request cannot be written."""
        post_request(self.path, "stop", by=BY)
        self._say(WAITING, "the run ends its step and saves; then a new one starts")

    def look(self, run: RunSnapshot) -> None:
        if self._process is None:
            if run.status is not RunStatus.RUNNING:
                self._begin()
            return
        if (run_dir := self._process.run_dir()) is not None:
            self._process.keep_log_in(run_dir / "logs")
            self._say(GOOD, f"new run {run_dir.name}: {fixes.told(self.remedy)}")
            self.show(run_dir)
        elif self._process.exit_code is not None:
            self._say(FAILED, self._process.last_error())

    def _begin(self) -> None:
        words = ["train", "--parent", self.path, "--by", BY]
        log = Path(self.path).parent / f".starting-{os.getpid()}.log"
        self._process = detached.start([*words, *fixes.options(self.remedy)], log)


def begin(remedy: fixes.Remedy, run: RunSnapshot, show: Callable[[Path], None]) -> Mending:
    """Start applying a remedy that changes the configuration or goes back. Raises RunError."""
    running = run.status is RunStatus.RUNNING
    if remedy.kind == fixes.LIVE and running:
        return LiveChange(remedy, run.path)
    if not remedy.start_over:
        return GoBack(remedy, run.path, attempt=run.attempt)
    fresh = StartOver(remedy, run.path, show=show)
    if running:
        fresh.stop()
    return fresh
