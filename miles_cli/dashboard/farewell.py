"""What stays in the terminal after the dashboard has closed: how each run stands and what to type next."""

from __future__ import annotations

from collections.abc import Sequence

from miles.record.status import RunStatus
from miles_cli.dashboard.numbers import duration, number
from miles_cli.dashboard.snapshot import RunSnapshot

_RESUMABLE = (RunStatus.DEAD, RunStatus.FAILED, RunStatus.STOPPED, RunStatus.INTERRUPTED)


def farewell(runs: Sequence[RunSnapshot], command: str | None) -> list[str]:
    """One block of plain lines per run; `command` is one that was chosen in the dashboard."""
    lines = [line for run in runs for line in _about(run)]
    return [*lines, f"  chosen, and not seen to be done: {command}"] if command else lines


def _about(run: RunSnapshot) -> list[str]:
    at = "" if run.step is None else f", step {run.step}" + (f" of {run.total}" if run.total else "")
    eta = "" if run.eta is None else f", {duration(run.eta)} to go"
    lines = [f"{run.name}: {run.status}{at}{eta}"]
    reward = run.tracks.get("rollout/raw_reward")
    if reward is not None:
        lines.append(f"  reward {number(reward.last)}")
    lines += [f"  {alert.severity}: {alert.rule} {alert.title}" for alert in run.open_alerts]
    if run.status in _RESUMABLE:
        lines.append(f"  go on: miles runs resume {run.path}")
    if run.open_alerts:
        lines.append(f"  cause and fix: miles diagnose {run.path}")
    lines.append(f"  look again: miles watch {run.path}")
    return lines
