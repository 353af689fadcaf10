"""Tables of runs, and one run in full."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from miles.record import RunReader, RunStatus, events
from miles.record.runs import RunInfo
from miles.record.summary import read_summary
from miles_cli.dashboard.numbers import duration, number
from miles_cli.dashboard.snapshot import GONE

SHOWN_SETTINGS = (
    "model.hf_checkpoint",
    "data.prompt_data",
    "algorithm.advantage_estimator",
    "optimizer.lr",
    "rollout.rollout_batch_size",
    "rollout.n_samples_per_prompt",
    "run.seed",
)


def table_lines(runs: Sequence[RunInfo], now: float | None = None) -> Iterator[str]:
    """One line per run under a heading."""
    now = time.time() if now is None else now
    rows = [("RUN", "STATUS", "STEP", "REWARD", "TOOK", "ACTIVE"), *(_row(run, now) for run in runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def _row(run: RunInfo, now: float) -> tuple[str, ...]:
    step = f"{run.step}" if run.total_steps is None else f"{run.step}/{run.total_steps}"
    return (
        run.id,
        run.status.value if run.attempts < 2 else f"{run.status} (attempt {run.attempts})",
        step,
        "-" if run.reward is None else f"{run.reward:.3f}",
        "-" if run.seconds is None else duration(run.seconds),
        f"{duration(max(0.0, now - run.active))} ago",
    )


def run_dict(reader: RunReader) -> dict[str, Any]:
    """Everything `miles runs show` says, as values."""
    history, summary = reader.history, read_summary(reader.layout.root)
    return {
        "id": reader.run_id,
        "path": str(reader.layout.root),
        "status": reader.status().value,
        "ended_by": ended_by(reader),
        "step": history.last_step or 0,
        "attempts": reader.attempt,
        "resumed_from": {str(k): v for k, v in sorted(history.resumes.items())},
        "lineage": lineage(reader),
        "settings": {key: value for key in SHOWN_SETTINGS if (value := _setting(reader, key)) is not None},
        "meta": reader.meta,
        "checkpoints": [{"step": e["step"], "path": e["path"]} for e in reader.events("checkpoint")],
        "samples": reader.sample_steps(),
        "metrics": {name: series.last for name, series in sorted(history.series.items())},
        "summary": None if summary is None else summary.__dict__,
    }


def run_lines(run: dict[str, Any]) -> Iterator[str]:
    """The same for people."""
    yield f"{run['id']}: {run['status']}, step {run['step']}"
    if run["ended_by"]:
        yield from (f"  {line}" for line in run["ended_by"].splitlines())
    yield f"  directory    {run['path']}"
    yield from _lineage_lines(run["lineage"])
    settings = max(map(len, run["settings"]), default=0)
    for key, value in run["settings"].items():
        yield f"  {key:<{settings}}  {value}"
    steps = [str(checkpoint["step"]) for checkpoint in run["checkpoints"]]
    yield f"  checkpoints  {', '.join(steps) if steps else 'none'}"
    yield from _summary_lines(run["summary"])
    if run["metrics"]:
        yield "  last values"
    width = max(map(len, run["metrics"]), default=0)
    for name, value in run["metrics"].items():
        yield f"    {name:<{width}}  {number(value)}"


def _summary_lines(summary: dict[str, Any] | None) -> Iterator[str]:
    if summary is None:
        return
    yield f"  took         {duration(summary['seconds'])}"
    if summary["reward_first5"] is not None:
        first, last = summary["reward_first5"], summary["reward_last5"]
        yield f"  reward       {first:.3f} -> {last:.3f} (means of five steps)"
    for name, after in summary["eval_after"].items():
        before = summary["eval_before"].get(name, {})
        for kind, value in after.items():
            yield f"  {name} {kind:<8} {number(before.get(kind, value))} -> {number(value)} (held out)"
    alerts = [f"{n} {severity}" for severity, n in summary["alerts"].items() if n]
    yield f"  alerts       {', '.join(alerts) if alerts else 'none'}"


def ended_by(reader: RunReader) -> str | None:
    """What the last attempt of a failed run raised, or that its process is gone; None for every other run."""
    status = reader.status()
    if status is RunStatus.DEAD:
        return GONE
    if status is not RunStatus.FAILED:
        return None
    raised = [event for event in reader.events(events.EXCEPTION) if event["attempt"] == reader.attempt]
    return f"{raised[-1]['type']}: {raised[-1]['message']}" if raised else None


def lineage(reader: RunReader) -> list[dict[str, Any]]:
    """Attempts and live changes in order of time: who asked for what, from which step on."""
    told: list[dict[str, Any]] = []
    for event in reader.events():
        if event["kind"] == events.RUN_START:
            from_step = reader.history.resumes.get(event["attempt"])
            about: dict[str, Any] = {key: event[key] for key in ("by", "changes", "parent") if key in event}
            told.append({"attempt": event["attempt"], "from_step": from_step, **about})
        elif event["kind"] == events.CONTROL and event["action"] == "set" and event["state"] == "applied":
            told.append({"step": event.get("step"), "by": event["by"], "set": event["patch"]})
    return told


def _lineage_lines(told: list[dict[str, Any]]) -> Iterator[str]:
    for entry in told:
        if "set" in entry:
            patch = ", ".join(f"{key} = {value}" for key, value in entry["set"].items())
            yield f"  live change  after step {entry['step']} by {entry['by']}: {patch}"
            continue
        changes = "".join(
            f", {key} {before} -> {after}" for key, (before, after) in entry.get("changes", {}).items()
        )
        start = "" if entry["from_step"] is None else f" from step {max(0, entry['from_step'])}"
        parent = f", a copy of {Path(entry['parent']).name}" if "parent" in entry else ""
        yield f"  attempt {entry['attempt']:<4} started{start} by {entry.get('by', 'cli')}{parent}{changes}"


def _setting(reader: RunReader, dotted: str) -> Any:
    section, _, name = dotted.partition(".")
    return reader.config.get(section, {}).get(name)
