"""One frame of a run as text: where it stands, its reward curve, its key metrics, its open alerts."""

from __future__ import annotations

import time
from pathlib import Path
from textwrap import wrap
from typing import Any

from miles.record.metrics import find_metric
from miles_cli.dashboard.canvas import Line
from miles_cli.dashboard.chart import Chart, Curve, draw_chart
from miles_cli.dashboard.feed import RunFeed
from miles_cli.dashboard.loglines import NUMERICS_FIELDS, numerics_text
from miles_cli.dashboard.numbers import number
from miles_cli.dashboard.scene import Scene
from miles_cli.dashboard.snapshot import RunSnapshot
from miles_cli.dashboard.strip import header, phase_bar
from miles_cli.dashboard.symbols import Symbols
from miles_cli.dashboard.view import View
from miles_cli.render.sparkline import sparkline

REWARD = "rollout/raw_reward"
CHART_HEIGHT = 9
SPARK_WIDTH, VALUE_WIDTH = 12, 8
KEY_METRICS = (
    REWARD,
    "rollout/response_len/mean",
    "rollout/truncated_ratio",
    "rollout/zero_std/fraction",
    "train/active_group_fraction",
    "train/entropy",
    "train/grad_norm",
    "train/explained_variance",
    "train/value_loss",
    "train/train_rollout_logprob_abs_diff",
    "train/tis_clipfrac",
    "route/flip_frac",
    "route/replayed_rows_frac",
    "rollout/spec_accept_length",
    "train/mtp_loss",
    "train/non_finite_elements",
    "train/lr",
    "perf/step_time",
    "perf/tokens_per_sec",
)


def load_snapshot(run_dir: Path) -> RunSnapshot:
    """Everything known of the run at this moment. Raises RunError when it is not a run."""
    feed = RunFeed(run_dir)
    while feed.loading:
        feed.advance()
    return feed.snapshot()


def frame_lines(run: RunSnapshot, width: int, symbols: Symbols, now: float | None = None) -> list[str]:
    """The frame, at most `width` columns wide, without colour: marks carry what colour would."""
    scene = Scene((run,), 0, View(), time.time() if now is None else now, symbols)
    lines = [_text(line) for line in header(scene, width)]
    if run.phase_totals:
        lines.append(_text(phase_bar(scene, width)))
    if REWARD in run.tracks:
        lines += ["", *_chart(run, scene, width, symbols)]
    if run.tracks:
        lines += ["", *_table(run, width, symbols)]
    if run.numerics is not None:
        lines += ["", *(f" {line}" for line in wrap(numerics_text(run.numerics), width - 1))]
    return [line.rstrip() for line in [*lines, "", *_alerts(run, symbols)]]


def snapshot_dict(run: RunSnapshot) -> dict[str, Any]:
    """The frame as values for --json."""
    return {
        "run_id": run.run_id,
        "path": run.path,
        "profile": run.profile,
        "status": run.status.value,
        "attempt": run.attempt,
        "step": run.step,
        "total_steps": run.total,
        "eta_seconds": run.eta,
        "last_event": run.last_time or None,
        "open_phases": [{"name": p.name, "step": p.step, "since": p.start} for p in run.open_phases],
        "numerics": run.numerics and {k: v for k, v in run.numerics.items() if k in NUMERICS_FIELDS},
        "metrics": {name: track.last for name, track in sorted(run.tracks.items())},
        "unhealthy": [name for name, track in sorted(run.tracks.items()) if _is_sick(name, track.last)],
        "alerts": [
            {"rule": a.rule, "severity": a.severity, "title": a.title, "step": a.step}
            for a in run.open_alerts
        ],
    }


def shown_metrics(run: RunSnapshot) -> list[str]:
    """The key metrics and evaluations that this run reports."""
    evaluations = sorted(n for n in run.tracks if n.startswith("eval/") and "truncated" not in n)
    return [name for name in (*KEY_METRICS, *evaluations) if name in run.tracks]


def _chart(run: RunSnapshot, scene: Scene, width: int, symbols: Symbols) -> list[str]:
    track = run.tracks[REWARD]
    first, last = scene.view.span((run,))
    canvas = draw_chart(Chart((Curve(track),), first, last), width, CHART_HEIGHT, symbols)
    return [f" mean reward  {number(track.last)}", *(_text(line) for line in canvas.lines())]


def _table(run: RunSnapshot, width: int, symbols: Symbols) -> list[str]:
    """Name, value, curve and band; where room is short the value stays, and a name is told by its end."""
    names = shown_metrics(run)
    label = max(1, min(max(map(len, names), default=0), width - VALUE_WIDTH - 6))
    lines = []
    for name in names:
        track, metric = run.tracks[name], find_metric(name)
        told = name if len(name) <= label else symbols.ellipsis + name[len(symbols.ellipsis) - label :]
        line = f" {told:<{label}}  {number(track.last):>{VALUE_WIDTH}}  "
        if len(line) + SPARK_WIDTH + 4 <= width:
            end = max(run.last_step, run.first_step + 1)
            line += sparkline(track, run.first_step, end, SPARK_WIDTH, symbols) + "  "
        if metric is not None and metric.healthy is not None:
            mark = symbols.bad if _is_sick(name, track.last) else symbols.good
            line += f"{mark} {symbols.plain(str(metric.healthy))}"
        lines.append(line[:width])
    return lines


def _is_sick(name: str, value: float) -> bool:
    metric = find_metric(name)
    return metric is not None and metric.healthy is not None and not metric.healthy.contains(value)


def _alerts(run: RunSnapshot, symbols: Symbols) -> list[str]:
    cause = run.cause_of_death
    died = [] if cause is None else [f" {symbols.bad} {line}" for line in cause.splitlines()[:1]]
    died += [] if cause is None else [f"   {line.strip()}" for line in cause.splitlines()[1:]]
    if not run.open_alerts:
        return died or [f" {symbols.good} no open alerts"]
    return died + [
        f" {symbols.severity(a.severity)} {a.severity} {a.rule} {a.title}"
        + ("" if a.step is None else f" (step {a.step})")
        for a in run.open_alerts
    ]


def _text(line: Line) -> str:
    return "".join(text for text, _ in line)
