"""Panels for values that come by layer or by depth: a heatmap over the steps, and bars of the present."""

from __future__ import annotations

import re

import numpy as np

from miles.record.metrics import find_metric
from miles_cli.dashboard.canvas import Canvas, Line
from miles_cli.dashboard.numbers import number
from miles_cli.dashboard.paint_chart import head, missing
from miles_cli.dashboard.panels import Panel, matching
from miles_cli.dashboard.resample import column_of, resample
from miles_cli.dashboard.scene import Painted, Scene

HEAT_LEVELS = 8
_GUTTER = 5


def paint_heatmap(panel: Panel, number_key: int, scene: Scene, width: int, height: int) -> Painted:
    """One row per layer (or the worst of neighbouring layers), one column per stretch of steps."""
    names = matching(panel.metrics, scene.run.tracks)
    columns, rows = width - _GUTTER, height - 1
    if not names or columns < 8 or rows < 1:
        return missing(panel, number_key, width, height)
    first, last = scene.view.span(scene.runs)
    grid = _grid(names, scene, first, last, columns)
    groups = np.array_split(np.arange(len(names)), min(rows, len(names)))
    healthy = (found := find_metric(names[0])) and found.healthy
    finite = grid[np.isfinite(grid)]
    top = float(finite.max()) if finite.size else 1.0
    if healthy and healthy.high is not None:
        top = max(top, healthy.high)
    canvas = Canvas(width, height)
    # The layers share the height: each is as many rows tall as fit.
    tall = max(1, rows // len(groups))
    for i, group in enumerate(groups):
        label = f"{index_of(names[group[0]])}"
        label += f"-{index_of(names[group[-1]])}" if len(group) > 1 else ""
        with np.errstate(all="ignore"):
            worst = np.fmax.reduce(grid[group], axis=0)
        for row in range(i * tall, (i + 1) * tall):
            canvas.put(row, 0, f"{label if row == i * tall else '':>{_GUTTER - 1}}", "axis")
            _draw_row(canvas, row, worst, top, scene)
    _draw_steps(canvas, len(groups) * tall, first, last, scene)
    worst_now = _worst(names, scene)
    sick = bool(healthy and worst_now is not None and not healthy.contains(worst_now))
    title = head(panel, number_key)
    if worst_now is not None:
        title += [(f" {scene.symbols.bad} " if sick else "  ", "bad"), ("worst ", "axis")]
        title += [(number(worst_now), "value_bad" if sick else "value")]
    ramp = scene.symbols.heat.strip()
    note: Line = [
        ("0 ", "axis"),
        *[(c, f"heat{2 * i + 1}") for i, c in enumerate(ramp)],
        (f" {number(top)}", "axis"),
    ]
    return Painted(title, note, canvas.lines(), sick)


def _grid(names: list[str], scene: Scene, first: int, last: int, columns: int) -> np.ndarray:
    """Mean by layer and column, NaN where nothing was reported; columns between steps repeat the first."""
    grid = np.full((len(names), columns), np.nan)
    for i, name in enumerate(names):
        sampled = resample(scene.run.tracks[name], first, last, columns)
        grid[i, sampled.at] = sampled.mean
        gaps = np.diff(sampled.at, append=sampled.at[-1] + 1 if len(sampled.at) else 0)
        for at, gap, value in zip(sampled.at, gaps, sampled.mean, strict=True):
            if gap > 1 and gap <= 2 * columns // max(1, last - first) + 1:
                grid[i, at : at + gap] = value
    return grid


def _worst(names: list[str], scene: Scene) -> float | None:
    """The largest present (or inspected) value over the layers."""
    cursor = scene.view.cursor
    tracks = [scene.run.tracks[name] for name in names]
    values = [t.last if cursor is None else t.at(cursor) for t in tracks]
    return max((v for v in values if v is not None and v == v), default=None)


def _draw_row(canvas: Canvas, row: int, values: np.ndarray, top: float, scene: Scene) -> None:
    ramp, cursor = scene.symbols.heat, scene.view.cursor
    limit = canvas.width
    if cursor is not None:
        first, last = scene.view.span(scene.runs)
        limit = _GUTTER + int(column_of(np.array([cursor]), first, last, len(values))[0])
    for column, value in enumerate(values.tolist(), start=_GUTTER):
        if value != value:
            continue
        unit = min(1.0, max(0.0, value / top)) if top else 0.0
        glyph = ramp[1 + min(len(ramp) - 2, int(unit * (len(ramp) - 1)))]
        style = f"heat{min(HEAT_LEVELS - 1, int(unit * HEAT_LEVELS))}" if column <= limit else "faded"
        canvas.put(row, column, glyph, style)


def _draw_steps(canvas: Canvas, row: int, first: int, last: int, scene: Scene) -> None:
    canvas.put(row, _GUTTER, scene.symbols.base * (canvas.width - _GUTTER), "axis")
    canvas.put(row, 0, f"{first:>{_GUTTER - 1}} ", "axis")
    canvas.put(row, canvas.width - len(str(last)) - 1, f" {last}", "axis")


def index_of(name: str) -> int:
    """The number at the end of a metric's name."""
    found = re.search(r"(\d+)$", name)
    return int(found.group(1)) if found else 0


def paint_bars(panel: Panel, number_key: int, scene: Scene, width: int, height: int) -> Painted:
    """The present value of each member as a bar, on the scale of the largest."""
    names = matching(panel.metrics, scene.run.tracks)
    if not names:
        return missing(panel, number_key, width, height)
    cursor, symbols = scene.view.cursor, scene.symbols
    tracks = [scene.run.tracks[name] for name in names]
    values = [t.last if cursor is None else t.at(cursor) for t in tracks]
    top = max((v for v in values if v is not None), default=1.0) or 1.0
    room = max(4, width - 16)
    body: list[Line] = []
    for name, value in zip(names, values, strict=True):
        told = value if value is not None else 0.0
        filled = round(room * max(0.0, told) / top)
        body.append(
            [
                (f" {index_of(name):>3} ", "axis"),
                (symbols.bar * filled, "line"),
                (symbols.track * (room - filled), "axis"),
                (f" {number(told) if value is not None else 'absent':>7}", "value"),
            ]
        )
    body = body[:height]
    return Painted(head(panel, number_key), [], [*body, *[[(" " * width, "")]] * (height - len(body))])
