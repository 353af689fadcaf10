"""What a person or a program sees of a run that goes on: lines, a progress bar, or JSON; alerts apart.

stdout carries the steps, stderr everything that is said about them.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_cli.errors import keep_tracebacks_in
from miles_cli.speech import say
from miles_cli.step_line import step_line
from miles_cli.tty import is_interactive
from miles_cli.units import duration

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

RUN_DIRECTORY = "run directory: "
"""Begins the line that names the directory of a run."""


class RunView:
    """Observer of a run."""

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    @contextmanager
    def live(self) -> Iterator[RunView]:
        """Show a progress bar on stderr while the run goes on, where stderr is a terminal."""
        if self.quiet or not is_interactive(sys.stderr):
            yield self
            return
        with _progress_bar() as progress:
            self._progress = progress
            yield self
        self._progress = None

    def on_step(self, row: dict[str, Any]) -> None:
        """One training step: a line, or an object under `--json`."""
        self._advance("train", row["step"], row["total"])
        if self.as_json:
            print_json_line(row)
        elif not self.quiet:
            say(step_line(row, _line_width()), sys.stdout)

    def on_event(self, kind: str, fields: dict[str, Any]) -> None:
        """Everything else that happens, in words on stderr."""
        if kind == "run":
            keep_tracebacks_in(Path(fields["run_dir"]) / "logs")
        if kind == "stage" and fields["state"] == "step":
            self._advance(fields["name"], fields["step"], fields["total"])
        text = EVENT_TEXTS.get(kind, _other)(fields)
        if text and (not self.quiet or kind in ALWAYS_SAID):
            say(text, sys.stderr)

    def _advance(self, stage: str, step: int, total: int) -> None:
        if self._progress is None:
            return
        if self._task is None or self._progress.tasks[self._task].description != stage:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(stage, total=total)
        self._progress.update(self._task, completed=step)


def print_json_line(entries: dict[str, Any]) -> None:
    """One object per line, written as the run record writes it: non-finite numbers survive."""
    from miles.record.encoding import encode_line

    say(encode_line(entries).decode().rstrip("\n"), sys.stdout)


def _progress_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        refresh_per_second=4,
        redirect_stdout=sys.stdout.isatty(),
    )


def _line_width() -> int | None:
    """Columns of the terminal, or None where lines go to a file or a pipe."""
    return shutil.get_terminal_size().columns if is_interactive(sys.stdout) else None


def _run(fields: Mapping[str, Any]) -> str:
    attempt = f", attempt {fields['attempt']}" if fields["attempt"] > 1 else ""
    return f"{RUN_DIRECTORY}{fields['run_dir']}{attempt}"


def _stage(fields: Mapping[str, Any]) -> str:
    if fields["state"] == "start":
        return f"{fields['name']}: {fields['total']} steps, once; kept for later runs"
    if fields["state"] == "end":
        return f"{fields['name']}: done in {duration(fields['seconds'])}"
    return ""


def _eval(fields: Mapping[str, Any]) -> str:
    scores = [
        f"{name.removeprefix('eval/')} {value:.3f}" for name, value in fields.items() if _is_accuracy(name)
    ]
    version = fields.get("rollout/weight_version/eval", fields["step"])
    older = f" (weights of step {version:.0f})" if version != fields["step"] else ""
    return f"eval at step {fields['step']}{older}: {'  '.join(scores)}"


def _is_accuracy(name: str) -> bool:
    return name.startswith("eval/") and not name.endswith("-truncated_ratio")


def _alert(fields: Mapping[str, Any]) -> str:
    at = "" if fields.get("step") is None else f"step {fields['step']}: "
    explain = f"miles diagnose --explain {fields['rule']}"
    return f"{fields['severity']} {fields['rule']}: {at}{fields['title']}  ({explain})"


def _non_finite(fields: Mapping[str, Any]) -> str:
    where = f"{fields['what']} of {fields['tensor']}" if fields.get("tensor") else fields["what"]
    return f"non-finite: step {fields['step']}: {fields['count']} values in {where}"


def _bad_row(fields: Mapping[str, Any]) -> str:
    return f"left out: {fields['file']}:{fields['line']}: {fields['reason']}"


def _stopping(fields: Mapping[str, Any]) -> str:
    return "stopping at the end of this step, with a checkpoint; once more: now, without one"


def _checkpoint(fields: Mapping[str, Any]) -> str:
    return f"checkpoint: {fields['path']}"


def _submitted(fields: Mapping[str, Any]) -> str:
    return f"submitted: job {fields['id']} at {fields['address']}; Ctrl-C stops it at the end of its step"


def _job_log(fields: Mapping[str, Any]) -> str:
    return fields["line"]


def _worker_dead(fields: Mapping[str, Any]) -> str:
    return f"lost: {fields['worker']}: {fields['reason']}"


def _node_lost(fields: Mapping[str, Any]) -> str:
    return f"lost: the node {fields['address']} with {', '.join(fields['workers'])}"


def _restart(fields: Mapping[str, Any]) -> str:
    again = f"; the run goes on after step {fields['from_step']}" if "from_step" in fields else ""
    return f"restarted: {fields['worker']}{again}"


def _restart_failed(fields: Mapping[str, Any]) -> str:
    return (
        f"not started again: {fields['worker']}: {fields['reason']} (tries left: {fields['restarts_left']})"
    )


def _resumed_between_updates(fields: Mapping[str, Any]) -> str:
    return (
        f"warning: step {fields['step']} lies between two updates of the engines' weights (every "
        f"{fields['interval']} steps); they go on with its weights, where they had older ones"
    )


def _kernel_not_built(fields: Mapping[str, Any]) -> str:
    return f"torch decodes: {fields['reason']}"


def _kernel_not_exact(fields: Mapping[str, Any]) -> str:
    return f"torch computes: {fields['reason']}"


def _other(fields: Mapping[str, Any]) -> str:
    """Events without a sentence of their own are in the record; they are not said."""
    return ""


EVENT_TEXTS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "run": _run,
    "stage": _stage,
    "eval": _eval,
    "alert": _alert,
    "non_finite": _non_finite,
    "bad_row": _bad_row,
    "stopping": _stopping,
    "checkpoint": _checkpoint,
    "submitted": _submitted,
    "job_log": _job_log,
    "worker_dead": _worker_dead,
    "restart": _restart,
    "restart_failed": _restart_failed,
    "node_lost": _node_lost,
    "resumed_between_updates": _resumed_between_updates,
    "kernel_not_built": _kernel_not_built,
    "kernel_not_exact": _kernel_not_exact,
}

ALWAYS_SAID = (
    "alert",
    "non_finite",
    "worker_dead",
    "restart",
    "restart_failed",
    "node_lost",
    "resumed_between_updates",
    "stopping",
)
"""Said even under `--quiet`."""
