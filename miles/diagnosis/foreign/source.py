"""What a path holds when it is no run of ours: event files, metric logs, bare logs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from miles.diagnosis.foreign.console import STEP_LINES, printed_metrics
from miles.diagnosis.foreign.history import ForeignMetrics, understand
from miles.diagnosis.foreign.jsonl import is_metric_log, read_json_metrics
from miles.diagnosis.foreign.tfevents import Scalar, read_scalars
from miles.diagnosis.logs import find_logs, scan_logs
from miles.diagnosis.report import Report, report_of
from miles.diagnosis.thresholds import DEFAULT, Thresholds
from miles.diagnosis.view import RecordView
from miles.errors import RunError

EVENTS, JSON = "TensorBoard", "JSON"
MAX_FILES = 20_000


@dataclass(frozen=True)
class Found:
    """Metric files of one directory, all of one kind: one run."""

    kind: str
    files: tuple[Path, ...]

    @property
    def modified(self) -> float:
        return max(path.stat().st_mtime for path in self.files)

    @property
    def directory(self) -> Path:
        return self.files[0].parent


def diagnose_path(path: Path, thresholds: Thresholds = DEFAULT) -> Report:
    """Assess a file or directory of another system. Raises RunError when nothing there can be read."""
    found = find_metrics(path)
    logs = [log for log in find_logs(path) if not found or log not in found[0].files]
    logs = [] if path.is_file() and found else logs
    if not found and not logs:
        raise RunError(
            "there is nothing here to diagnose",
            where=str(path),
            why="neither a run directory, nor TensorBoard event files or JSON metrics, nor *.log, *.out, "
            "*.err or *.txt files",
            fix="name the directory that holds them",
        )
    points = _points(found[0]) if found else printed_metrics(scan_logs(logs, STEP_LINES).telling)
    metrics = understand(points)
    view = RecordView(
        metrics.history, status=None, thresholds=thresholds, whole=True, foreign=True, log_files=tuple(logs)
    )
    source = f"{found[0].kind} files" if found else "logs"
    return report_of(
        view,
        path.name or str(path),
        _source(source, metrics),
        last_words=tuple(view.logs.last_words),
        notes=tuple(_notes(metrics, found)),
    )


def find_metrics(path: Path) -> list[Found]:
    """Runs below `path`, the most recently written first; only event files where there are any."""
    if path.is_file():
        kind = _kind(path)
        return [Found(kind, (path,))] if kind else []
    by_run: dict[tuple[str, Path], list[Path]] = defaultdict(list)
    for file, _ in zip(sorted(path.rglob("*")), range(MAX_FILES), strict=False):
        if (kind := _kind(file)) is not None:
            by_run[kind, file.parent].append(file)
    found = [Found(kind, tuple(files)) for (kind, _), files in by_run.items()]
    best = next((k for k in (EVENTS, JSON) if any(run.kind == k for run in found)), None)
    return sorted((run for run in found if run.kind == best), key=lambda run: -run.modified)


def _kind(file: Path) -> str | None:
    if not file.is_file():
        return None
    if ".tfevents." in file.name:
        return EVENTS
    return JSON if is_metric_log(file) else None


def _points(found: Found) -> Iterator[Scalar]:
    read = {EVENTS: read_scalars, JSON: read_json_metrics}[found.kind]
    return chain.from_iterable(read(file) for file in found.files)


def _source(files: str, metrics: ForeignMetrics) -> str:
    return f"{files} of {metrics.system}" if metrics.known else files


def _notes(metrics: ForeignMetrics, found: list[Found]) -> Iterator[str]:
    if metrics.known or metrics.unknown:
        total = len(metrics.known) + len(metrics.unknown)
        yield f"{len(metrics.known)} of {total} metrics are ones that rules can read"
    if len(found) > 1:
        others = ", ".join(str(run.directory) for run in found[1:4])
        yield f"{len(found)} runs lie here; this is the last, {found[0].directory} (others: {others})"
