"""The entry point of a submitted job: `python -m miles.orchestration.job_entry job.json`.

The job's process is the run's driver; its workers are actors of the same cluster. stdout carries marked lines
for the launcher (`job_wire`) among whatever else is printed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles import environment
from miles.errors import MilesError
from miles.orchestration.job_order import JobOrder
from miles.orchestration.job_wire import WireWriter
from miles.orchestration.record_stream import RecordStream
from miles.planning import Plan, collect_facts, make_plan

if TYPE_CHECKING:
    from miles.orchestration.job import RunOutcome


class WireObserver:
    """Lets the launcher show the run as if it went on there."""

    def __init__(self, wire: WireWriter) -> None:
        self._wire = wire

    def on_event(self, kind: str, fields: dict[str, Any]) -> None:
        self._wire.send("event", name=kind, fields=fields)

    def on_step(self, row: dict[str, Any]) -> None:
        self._wire.send("step", row=row)


def main(path: Path) -> int:
    """Do what the order says; returns the exit code of the run."""
    wire = WireWriter()
    try:
        outcome = _conduct(JobOrder.read(path), wire)
    except MilesError as error:
        wire.send("outcome", exit_code=int(error.exit_code), error=_as_fields(error))
        return int(error.exit_code)
    error_fields = None if outcome.error is None else _as_fields(outcome.error)
    wire.send("outcome", exit_code=int(outcome.exit_code), error=error_fields)
    return int(outcome.exit_code)


def _conduct(order: JobOrder, wire: WireWriter) -> RunOutcome:
    """Run where the launcher looks, or in a directory of our own that is streamed to it."""
    if order.shares_files():
        os.chdir(order.cwd)
        environment.export("MILES_CACHE_DIR", order.cache_dir)
        wire.send("place", shared=True, run_dir=order.run_dir)
        return _run(order, Path(order.run_dir), wire)
    wire.send("place", shared=False, run_dir=str(order.work_dir))
    # A new run makes its directory; the stream waits for it.
    with RecordStream(order.work_dir, wire, order.have):
        return _run(order, order.work_dir, wire)


def _run(order: JobOrder, run_dir: Path, wire: WireWriter) -> RunOutcome:
    resolved = order.resolved
    plan: Plan = make_plan(resolved, collect_facts(resolved.config, in_cluster=True))
    for name, value in plan.exports:
        environment.export(name, value)

    # These load torch, which reads the environment once.
    from miles.orchestration.launch import run
    from miles.orchestration.resume import resume

    observer = WireObserver(wire)
    if order.resume:
        return resume(
            run_dir,
            resolved,
            plan,
            from_step=order.from_step,
            sets=order.sets,
            by=order.by,
            observer=observer,
            in_cluster=True,
        )
    return run(resolved, plan, run_dir=run_dir, observer=observer, in_cluster=True)


def _as_fields(error: MilesError) -> dict[str, str]:
    return {"what": error.what, "where": error.where, "why": error.why, "fix": error.fix}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
