"""`miles watch` where nothing can be drawn: one line per step, or one object per event."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from miles.record import RunReader, RunStatus
from miles_cli.render.json_text import json_text
from miles_cli.render.runs_text import ended_by
from miles_cli.step_line import step_line

POLL_SECONDS = 0.5
CAUGHT_UP_STEPS = 10
"""Steps of the past that are printed before new ones."""


def follow(run_dirs: list[Path], as_json: bool) -> list[RunStatus]:
    """Print what comes until every run has ended; returns how. Of several runs, each line names its own."""
    followed = [_Followed(path, as_json, len(run_dirs) > 1) for path in run_dirs]
    # Every run advances, so no short-circuit.
    while sum(run.advance() for run in followed) < len(followed):
        time.sleep(POLL_SECONDS)
    for run in followed:
        run.tell_end()
    return [run.status for run in followed]


class _Followed:
    """One run, with what was printed of it."""

    def __init__(self, run_dir: Path, as_json: bool, named: bool) -> None:
        self._reader = RunReader(run_dir, read=False)
        self._as_json = as_json
        self._prefix = f"{self._reader.run_id}  " if named else ""
        self._caught_up = False
        self.status = RunStatus.EMPTY

    def advance(self) -> bool:
        """Print what is new; whether the run has ended and all of it is printed."""
        # The status first: what was written before it was asked for is read after.
        self.status = self._reader.status()
        records = self._reader.poll()
        if not self._caught_up and not self._as_json:
            records = _last_steps(records)
        self._caught_up = True
        for record in records:
            self._print_json(record) if self._as_json else self._print_line(record)
        return self.status.ended

    def tell_end(self) -> None:
        """How it ended, on stderr; of a run that failed also why, and what to type next."""
        typer.echo(f"{self._reader.run_id}: {self.status}", err=True)
        if cause := ended_by(self._reader):
            typer.echo(f"  {cause}\nNext: miles diagnose {self._reader.run_id}", err=True)

    def _print_json(self, record: Mapping[str, Any]) -> None:
        named = {"run_id": self._reader.run_id, **record} if self._prefix else record
        typer.echo(json_text(named, indent=False))

    def _print_line(self, record: Mapping[str, Any]) -> None:
        """Steps and evaluations go to stdout, alerts to stderr."""
        if record["kind"] == "alert":
            alert = f"{record['severity']} {record['rule']} {record['title']} ({record['state']})"
            typer.echo(self._prefix + alert, err=True)
        if record["kind"] != "metrics":
            return
        total = self._reader.config.get("rollout", {}).get("num_rollout") or "?"
        if "rollout/raw_reward" in record["metrics"]:
            row = {"step": record["step"], "total": total, "metrics": record["metrics"]}
            typer.echo(self._prefix + step_line(row))
        evaluations = {
            n: v for n, v in record["metrics"].items() if n.startswith("eval/") and "truncated" not in n
        }
        if evaluations:
            told = "  ".join(f"{name} {value:.3f}" for name, value in sorted(evaluations.items()))
            typer.echo(f"{self._prefix}step {record['step']}/{total}  {told}")


def _last_steps(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of the last few steps."""
    steps = sorted({r["step"] for r in records if r["kind"] == "metrics"})[-CAUGHT_UP_STEPS:]
    return [r for r in records if steps and r.get("step", -1) >= steps[0]]
