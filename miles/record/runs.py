"""Finding runs: every run of a directory, and the one that a user means."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from miles.errors import RunError
from miles.record.layout import RunLayout
from miles.record.reader import RunReader
from miles.record.status import RunStatus
from miles.record.summary import REWARD, REWARD_SPAN

LAST = "last"


@dataclass(frozen=True)
class RunInfo:
    """One row of a list of runs."""

    id: str
    path: str
    status: RunStatus
    step: int
    total_steps: int | None
    reward: float | None
    """Mean raw reward of the last five steps."""
    seconds: float | None
    """From the first to the last record."""
    active: float
    """When the run last wrote something, seconds since the epoch."""
    attempts: int


def find_runs(runs_dir: str | Path) -> list[Path]:
    """Run directories under `runs_dir`, the most recently active first."""
    root = Path(runs_dir)
    if not root.is_dir():
        return []
    runs = [path for path in root.iterdir() if is_run(path)]
    return sorted(runs, key=lambda run: (last_active(run), run.name), reverse=True)


def is_run(path: Path) -> bool:
    layout = RunLayout(path)
    return layout.meta.is_file() or layout.events_dir.is_dir()


def last_active(run_dir: Path) -> float:
    """When the run last wrote something, seconds since the epoch."""
    layout = RunLayout(run_dir)
    traces = [layout.meta, layout.summary, layout.root, *layout.events_dir.glob("*.jsonl")]
    return max(path.stat().st_mtime for path in traces if path.exists())


def resolve_run(reference: str | None, runs_dir: str | Path) -> Path:
    """The run directory meant by a path, an id, the unique beginning of an id, or "last" (also: None).

    Raises RunError, with the nearest names, when there is no such run or when a beginning fits several.
    """
    runs = find_runs(runs_dir)
    if reference is None or reference == LAST:
        if not runs:
            raise RunError(
                "there are no runs yet", where=str(runs_dir), fix="miles train --profile quickstart"
            )
        return runs[0]
    by_id = {run.name: run for run in runs}
    if reference in by_id:
        return by_id[reference]
    if is_run(Path(reference)):
        return Path(reference)
    matches = [run for run in runs if run.name.startswith(reference)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = ", ".join(run.name for run in matches[:5])
        raise RunError(
            f"{reference!r} is the beginning of {len(matches)} runs", why=names, fix="type more of it"
        )
    raise RunError(
        f"there is no run {reference!r}", where=str(runs_dir), fix=_suggestion(reference, list(by_id))
    )


def describe_run(run_dir: Path) -> RunInfo:
    """Read what a table of runs shows."""
    reader = RunReader(run_dir)
    rewards = list(reader.series(REWARD).values)[-REWARD_SPAN:]
    rows = reader.rows()
    total = reader.config.get("rollout", {}).get("num_rollout")
    return RunInfo(
        id=reader.run_id,
        path=str(run_dir),
        status=reader.status(),
        step=reader.history.last_step or 0,
        total_steps=total if isinstance(total, int) else None,
        reward=sum(rewards) / len(rewards) if rewards else None,
        seconds=rows[-1].time - rows[0].time if rows else None,
        active=last_active(run_dir),
        attempts=reader.attempt,
    )


def _suggestion(reference: str, ids: list[str]) -> str:
    near = difflib.get_close_matches(reference, ids, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}? (all of them: miles runs ls)"
    return "list the runs with: miles runs ls"
