"""A chart panel: which curves, what its title says of the present, and whether that is healthy."""

from __future__ import annotations

import math

import numpy as np

from miles.record.metrics import Metric, find_metric
from miles_cli.dashboard.canvas import Line
from miles_cli.dashboard.chart import Chart, Curve, Mark, draw_chart
from miles_cli.dashboard.numbers import number
from miles_cli.dashboard.panels import Panel, matching, short_name
from miles_cli.dashboard.scene import Painted, Scene
from miles_cli.dashboard.snapshot import RunSnapshot
from miles_cli.dashboard.symbols import Symbols
from miles_cli.dashboard.track import TrackView

MAX_CURVES = 4
_TREND = 0.02
"""Relative change between the last two stretches that counts as a movement."""


def paint_chart(
    panel: Panel, number_key: int, scene: Scene, width: int, height: int, focused: bool
) -> Painted:
    """The panel's inside in `width` x `height` cells."""
    names = matching(panel.metrics, scene.run.tracks)[:MAX_CURVES]
    if not names:
        return missing(panel, number_key, width, height)
    cursor = scene.view.cursor if scene.view.shared or focused else None
    metric, track = find_metric(names[0]), scene.run.tracks[names[0]]
    value = track.last if cursor is None else track.at(cursor)
    first, last = scene.view.span(scene.runs)
    chart = Chart(
        curves=_curves(names, scene),
        first=first,
        last=last,
        healthy=metric.healthy if metric else None,
        log=scene.view.log,
        averaged=scene.view.averaged,
        cursor=cursor,
        marks=_marks(scene.run, scene.symbols),
    )
    sick = value is not None and not _sound(value, metric)
    legend = _legend(names, scene, cursor)
    title = _title(panel, number_key, value, track, cursor, sick, scene.symbols)
    canvas = draw_chart(chart, width, height - bool(legend), scene.symbols)
    body = canvas.lines()
    return Painted(title, _note(metric, sick, scene.symbols), [*([legend] if legend else []), *body], sick)


def _sound(value: float, metric: Metric | None) -> bool:
    """Finite, and inside the healthy range where there is one."""
    healthy = metric.healthy if metric else None
    return math.isfinite(value) and (healthy is None or healthy.contains(value))


def missing(panel: Panel, number_key: int, width: int, height: int) -> Painted:
    """An empty panel says why it is empty."""
    blank: Line = [(" " * width, "")]
    rows = [blank] * max(0, (height - 1) // 2)
    rows.append([(panel.missing[:width].center(width), "axis")])
    rows += [blank] * (height - len(rows))
    return Painted(head(panel, number_key), [], rows[:height])


def head(panel: Panel, number_key: int) -> Line:
    return [(f"{number_key} ", "key"), (panel.title, "title")] if number_key else [(panel.title, "title")]


def _curves(names: list[str], scene: Scene) -> tuple[Curve, ...]:
    symbols = scene.symbols
    if len(scene.runs) == 1:
        several = len(names) > 1
        curves = [
            Curve(scene.run.tracks[name], _style(i), symbols.runs[i] if several else "", band=i == 0)
            for i, name in enumerate(names)
        ]
        return tuple(reversed(curves))
    order = sorted(range(len(scene.runs)), key=lambda i: i == scene.current)
    return tuple(
        Curve(
            scene.runs[i].tracks[names[0]],
            f"run{i % len(symbols.runs)}",
            symbols.runs[i % len(symbols.runs)],
            band=i == scene.current,
        )
        for i in order
        if names[0] in scene.runs[i].tracks
    )


def _style(i: int) -> str:
    return "line" if i == 0 else f"line{i + 1}"


def _legend(names: list[str], scene: Scene, cursor: int | None) -> Line:
    """One entry per curve where there are several: glyph, name and value."""
    symbols, line = scene.symbols, []
    if len(scene.runs) > 1:
        for i, run in enumerate(scene.runs):
            track = run.tracks.get(names[0])
            told = _told(track, cursor) if track else "absent"
            style = f"run{i % len(symbols.runs)}"
            line += [
                (f" {symbols.runs[i % len(symbols.runs)]} ", style),
                (f"{told} ", "strong" if i == scene.current else "label"),
            ]
        return line
    for i, name in enumerate(names if len(names) > 1 else ()):
        told = _told(scene.run.tracks[name], cursor)
        line += [(f" {symbols.runs[i]} ", _style(i)), (f"{short_name(name)} {told}", "label")]
    return line


def _told(track: TrackView, cursor: int | None) -> str:
    value = track.last if cursor is None else track.at(cursor)
    return "" if value is None else number(value)


def _title(
    panel: Panel,
    number_key: int,
    value: float | None,
    track: TrackView,
    cursor: int | None,
    sick: bool,
    symbols: Symbols,
) -> Line:
    line = head(panel, number_key)
    if value is None:
        return line
    line += [(f" {symbols.bad} " if sick else "  ", "bad"), (number(value), "value_bad" if sick else "value")]
    direction = trend(track.points()[3] if cursor is None else track.points()[3][: _until(track, cursor)])
    glyph = {1: symbols.up, -1: symbols.down, 0: symbols.flat}[direction]
    line.append((f" {glyph}", "axis"))
    return line


def _until(track: TrackView, cursor: int) -> int:
    return int(np.searchsorted(track.points()[0], cursor, side="right"))


def trend(values: np.ndarray) -> int:
    """1 rising, -1 falling, 0 level: the mean of the last tenth against the tenth before."""
    size = min(200, max(3, len(values) // 10))
    finite = values[-2 * size :]
    finite = finite[np.isfinite(finite)]
    if len(finite) < 4:
        return 0
    half = len(finite) // 2
    before, after = float(finite[:half].mean()), float(finite[half:].mean())
    if abs(after - before) <= _TREND * max(abs(before), abs(after), 1e-12):
        return 0
    return 1 if after > before else -1


def _note(metric: Metric | None, sick: bool, symbols: Symbols) -> Line:
    """The healthy range with a sign, not only a colour, of which side the value is on."""
    if metric is None:
        return []
    if metric.healthy is None:
        return [("not finite", "bad")] if sick else [(metric.unit, "axis")] if metric.unit else []
    band = symbols.plain(str(metric.healthy))
    return [("healthy ", "bad"), (band, "bad")] if sick else [(f"{symbols.good} ", "good"), (band, "axis")]


def _marks(run: RunSnapshot, symbols: Symbols) -> tuple[Mark, ...]:
    marks = [Mark(step, symbols.resumed, "resumed") for step in run.resumes.values()]
    ordered = sorted(run.alerts, key=lambda a: a.severity != "critical", reverse=True)
    marks += [Mark(a.step, symbols.severity(a.severity), a.severity) for a in ordered if a.step is not None]
    return tuple(marks)
