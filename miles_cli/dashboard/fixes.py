"""From an alert to what mends it: the change of the configuration, the command, the way it is applied."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from miles import environment
from miles.diagnosis import RecordView, assess
from miles.record import RunReader
from miles.record.status import RunStatus
from miles_cli.dashboard.canvas import Line
from miles_cli.dashboard.snapshot import Alert, RunSnapshot

LIVE, RESUME, MANUAL = "live", "resume", "manual"
READ_UP_TO = 32 << 20
"""Bytes of a record that are read while somebody waits for a window."""


@dataclass(frozen=True)
class Remedy:
    """One fix of an alert, as the rule proposed it."""

    text: str
    kind: str
    risk: str
    patch: Mapping[str, Any]
    from_step: int | None = None
    start_over: bool = False

    @property
    def changes_config(self) -> bool:
        return bool(self.patch)


def remedies(alert: Alert) -> list[Remedy]:
    """The fixes that the rule proposed when it fired."""
    return of_records(alert.record.get("fixes", ()))


def present_remedies(alert: Alert, run_dir: Path) -> list[Remedy]:
    """The fixes as the run stands now: what was live may have become too late since the alert was raised.

    Those of the alert where the rule no longer fires, or where the record is too large to read meanwhile.
    """
    reader = RunReader(run_dir, read=False)
    if reader.unread_bytes > READ_UP_TO:
        return remedies(alert)
    reader.poll()
    view = replace(RecordView.of_run(reader), whole=reader.status().ended)
    found = next((f for f in assess(view) if f.rule == alert.rule), None)
    return remedies(alert) if found is None else of_records(found.as_dict()["fixes"])


def of_records(records: Iterable[Mapping[str, Any]]) -> list[Remedy]:
    """Fixes as they stand in the record, those that change the configuration first."""
    found = [
        Remedy(
            fix["text"],
            fix["kind"],
            fix.get("risk", ""),
            fix.get("patch") or {},
            fix.get("from_step"),
            bool(fix.get("start_over")),
        )
        for fix in records
    ]
    return sorted(found, key=lambda r: not r.changes_config)


def difference(remedy: Remedy, config: Mapping[str, Mapping[str, Any]]) -> list[Line]:
    """The patch as removed and added lines of the run file, section by section."""
    lines: list[Line] = []
    section = ""
    for key, value in remedy.patch.items():
        head, _, leaf = key.rpartition(".")
        if head != section:
            section = head
            lines.append([(f"  [{head}]", "axis")])
        present = config.get(head, {}).get(leaf)
        if present is not None:
            lines.append([(f"- {leaf} = {_toml(present)}", "removed")])
        if value is not None:
            lines.append([(f"+ {leaf} = {_toml(value)}", "added")])
        elif present is not None:
            lines.append([(f"+ # {leaf}: back to its default", "added")])
    return lines


def options(remedy: Remedy) -> list[str]:
    """The options of `miles runs resume` or `miles train` that make the change."""
    words = [] if remedy.from_step is None or remedy.start_over else ["--from-step", str(remedy.from_step)]
    for key, value in remedy.patch.items():
        words += ["--set", f"{key}={'default' if value is None else _toml(value)}"]
    return words


def command(remedy: Remedy, run: RunSnapshot) -> str | None:
    """What to type to apply it outside the dashboard; None where only a person can act."""
    if not remedy.changes_config and remedy.kind != RESUME:
        return None
    name = shown_run(run.path)
    running = run.status is RunStatus.RUNNING
    if remedy.kind == LIVE and running:
        return shlex.join(
            ["miles", "runs", "set", name, *(f"{k}={_toml(v)}" for k, v in remedy.patch.items())]
        )
    if remedy.start_over:
        words = ["miles", "train", "--parent", name]
    else:
        words = ["miles", "runs", "resume", name, *(["--stop"] if running else [])]
    return shlex.join([*words, *options(remedy)])


def shown_run(path: str) -> str:
    """What to call a run on the command line: its id where that is enough, else its path."""
    here = Path(path).resolve()
    return here.name if here.parent == environment.runs_dir().resolve() else path


def told(remedy: Remedy) -> str:
    """The change in one line."""
    if not remedy.changes_config:
        return remedy.text
    return ", ".join(
        f"{key} = {'default' if value is None else _toml(value)}" for key, value in remedy.patch.items()
    )


def way(remedy: Remedy, run: RunSnapshot) -> str:
    """How confirming applies it, in words."""
    running = run.status is RunStatus.RUNNING
    if remedy.kind == LIVE and running:
        return "to the running run, at the next step boundary"
    if remedy.kind == MANUAL or not remedy.changes_config:
        return "something that only you can do"
    stop = "stops the run at the next step boundary; then " if running else ""
    if remedy.start_over:
        return stop + "in a new run: there is no checkpoint from before the trouble"
    where = (
        "the latest checkpoint" if remedy.from_step is None else f"the checkpoint of step {remedy.from_step}"
    )
    return f"{stop}the next attempt goes on from {where}"


def _toml(value: Any) -> str:
    return json.dumps(value)
