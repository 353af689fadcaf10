"""The line chart: a dim min/max band, a bright moving average, the healthy range, marks for NaN and alerts.

The cost of drawing depends on the width, not on the length of the run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from miles.record.metrics import Band
from miles_cli.dashboard.canvas import Canvas
from miles_cli.dashboard.numbers import number
from miles_cli.dashboard.resample import Columns, column_of, polyline, resample, smooth
from miles_cli.dashboard.scale import Scale, choose_scale
from miles_cli.dashboard.symbols import Symbols
from miles_cli.dashboard.track import MINUS_INF, NAN, PLUS_INF, TrackView


@dataclass(frozen=True)
class Curve:
    """One line. `glyph` marks its end where several share a chart: colour is not needed to tell them."""

    view: TrackView
    style: str = "line"
    glyph: str = ""
    band: bool = True
    """Whether the range of its values is drawn behind it."""


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step, shown under the curves."""

    step: int
    glyph: str
    style: str


@dataclass(frozen=True)
class Chart:
    """What to draw over the steps `first` to `last`. The last curve lies on top."""

    curves: tuple[Curve, ...]
    first: int
    last: int
    healthy: Band | None = None
    log: bool = False
    averaged: bool = True
    cursor: int | None = None
    marks: tuple[Mark, ...] = ()


def draw_chart(chart: Chart, width: int, height: int, symbols: Symbols) -> Canvas:
    """The chart in `width` x `height` cells: labels and axis on the left, steps in the last row."""
    canvas = Canvas(width, height)
    rows = height - 1
    if rows < 1 or width < 12:
        return canvas
    dot_columns = _plot_width(width) * symbols.dots_x
    sampled = [resample(c.view, chart.first, chart.last, dot_columns) for c in chart.curves]
    scale = _scale(sampled, chart)
    left = width - _plot_width(width)
    _draw_axis(canvas, chart, scale, left, rows, symbols)
    for curve, columns in zip(chart.curves, sampled, strict=True):
        _draw_curve(canvas, curve, columns, chart, scale, (left, rows), symbols)
    _draw_edges(canvas, chart, scale, left, rows, symbols)
    _draw_base(canvas, chart, left, rows, symbols)
    if chart.cursor is not None:
        _draw_cursor(canvas, chart, left, rows, symbols)
    return canvas


GUTTER = 8
"""Columns for labels and axis."""


def _plot_width(width: int) -> int:
    return width - GUTTER


def _scale(sampled: list[Columns], chart: Chart) -> Scale:
    low = np.concatenate([c.low for c in sampled]) if sampled else np.empty(0)
    high = np.concatenate([c.high for c in sampled]) if sampled else np.empty(0)
    return choose_scale(low, high, chart.healthy, chart.log)


def _draw_axis(canvas: Canvas, chart: Chart, scale: Scale, left: int, rows: int, symbols: Symbols) -> None:
    labelled = {0, rows - 1} | ({rows // 2} if rows >= 5 else set())
    for row in range(rows):
        value = scale.value(1 - (row + 0.5) / rows)
        healthy = chart.healthy is not None and chart.healthy.contains(value)
        glyph = symbols.axis_healthy if healthy else symbols.axis
        canvas.put(row, left - 1, glyph, "good" if healthy else "axis")
        if row in labelled:
            at = scale.value(1.0 if row == 0 else 0.0 if row == rows - 1 else 1 - (row + 0.5) / rows)
            canvas.put(row, 0, f"{number(at):>{left - 1}}", "axis")


def _draw_curve(
    canvas: Canvas,
    curve: Curve,
    columns: Columns,
    chart: Chart,
    scale: Scale,
    place: tuple[int, int],
    symbols: Symbols,
) -> None:
    left, rows = place
    shape = (rows * symbols.dots_y, (canvas.width - left) * symbols.dots_x)
    broken = columns.bad > 0
    raw = polyline(columns.at, columns.mean, broken, shape[1])
    line = polyline(columns.at, smooth(columns.mean), broken, shape[1]) if chart.averaged else raw
    if curve.band:
        dots = np.zeros(shape, bool)
        _fill(dots, columns.at, scale.unit(columns.low), scale.unit(columns.high))
        dots &= np.add.outer(np.arange(shape[0]), np.arange(shape[1])) % 2 == 0
        if chart.averaged:
            _trace(dots, scale.unit(raw))
        canvas.stamp(0, left, symbols.encode(dots), symbols.band, "band")
    dots = np.zeros(shape, bool)
    _trace(dots, scale.unit(line))
    canvas.stamp(0, left, symbols.encode(dots), symbols.line, curve.style)
    _mark_clipped(canvas, columns, scale, left, symbols)
    _mark_bad(canvas, columns, left, rows, symbols)
    _mark_end(canvas, curve, line, scale, place, symbols)


def _rows_of(units: np.ndarray, height: int) -> np.ndarray:
    """Dot row of each unit position, row 0 at the top."""
    return np.round((1 - units) * (height - 1)).astype(np.int64)


def _fill(dots: np.ndarray, at: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    finite = np.isfinite(low) & np.isfinite(high)
    tops, bottoms = _rows_of(high[finite], dots.shape[0]), _rows_of(low[finite], dots.shape[0])
    for column, top, bottom in zip(at[finite].tolist(), tops.tolist(), bottoms.tolist(), strict=True):
        if bottom > top:
            dots[top : bottom + 1, column] = True


def _trace(dots: np.ndarray, units: np.ndarray) -> None:
    """Draw a connected line through one position per dot column, NaN being a gap."""
    finite = np.isfinite(units)
    rows = _rows_of(np.where(finite, units, 0.0), dots.shape[0]).tolist()
    before: int | None = None
    for column, (row, drawn) in enumerate(zip(rows, finite.tolist(), strict=True)):
        if not drawn:
            before = None
            continue
        if before is None or abs(row - before) <= 1:
            dots[row, column] = True
        elif row > before:
            dots[before + 1 : row + 1, column] = True
        else:
            dots[row:before, column] = True
        before = row


def _mark_bad(canvas: Canvas, columns: Columns, left: int, rows: int, symbols: Symbols) -> None:
    """A mark in the gap: NaN and minus infinity at the bottom, plus infinity at the top."""
    for i in np.flatnonzero(columns.bad):
        column, bits = left + int(columns.at[i]) // symbols.dots_x, int(columns.bad[i])
        if bits & PLUS_INF:
            canvas.put(0, column, symbols.plus_inf, "bad")
        if bits & (NAN | MINUS_INF):
            canvas.put(rows - 1, column, symbols.nan if bits & NAN else symbols.minus_inf, "bad")


def _mark_clipped(canvas: Canvas, columns: Columns, scale: Scale, left: int, symbols: Symbols) -> None:
    """An arrow where a spike leaves the scale at the top."""
    for i in np.flatnonzero(np.nan_to_num(columns.high, nan=scale.high) > scale.high):
        canvas.put(0, left + int(columns.at[i]) // symbols.dots_x, symbols.clipped, "warning")


def _mark_end(
    canvas: Canvas, curve: Curve, line: np.ndarray, scale: Scale, place: tuple[int, int], symbols: Symbols
) -> None:
    drawn = np.flatnonzero(np.isfinite(line))
    if not curve.glyph or not len(drawn):
        return
    left, rows = place
    row = int(_rows_of(scale.unit(line[drawn[-1:]]), rows * symbols.dots_y)[0]) // symbols.dots_y
    canvas.put(row, left + int(drawn[-1]) // symbols.dots_x, curve.glyph, curve.style)


def _draw_edges(canvas: Canvas, chart: Chart, scale: Scale, left: int, rows: int, symbols: Symbols) -> None:
    """The bounds of the healthy range as dashed lines behind the curves, and a tint between them."""
    if chart.healthy is None:
        return
    inside = [row for row in range(rows) if chart.healthy.contains(scale.value(1 - (row + 0.5) / rows))]
    for bound in (chart.healthy.low, chart.healthy.high):
        if bound is None or not scale.low <= bound <= scale.high or (bound == 0 and scale.low == 0):
            continue
        row = int(_rows_of(scale.unit(np.array([bound])), rows)[0])
        for column in range(left, canvas.width):
            if canvas.blank(row, column):
                canvas.put(row, column, symbols.edge, "edge")
    if inside:
        canvas.tint(slice(inside[0], inside[-1] + 1), slice(left, canvas.width), "healthy")


def _draw_base(canvas: Canvas, chart: Chart, left: int, rows: int, symbols: Symbols) -> None:
    first, last = str(chart.first), str(chart.last)
    canvas.put(rows, left, symbols.base * (canvas.width - left), "axis")
    canvas.put(rows, left - 1, first + " ", "axis")
    canvas.put(rows, canvas.width - len(last) - 1, " " + last, "axis")
    room = canvas.width - len(last) - 2
    for mark in chart.marks:
        if chart.first <= mark.step <= chart.last:
            canvas.put(
                rows, min(room, _cell(mark.step, chart, canvas, left, symbols)), mark.glyph, mark.style
            )


def _draw_cursor(canvas: Canvas, chart: Chart, left: int, rows: int, symbols: Symbols) -> None:
    """The inspected step; what comes after it is faded."""
    assert chart.cursor is not None
    step = min(max(chart.cursor, chart.first), chart.last)
    column = _cell(step, chart, canvas, left, symbols)
    canvas.fade(slice(column + 1, canvas.width), slice(0, rows), "faded")
    for row in range(rows):
        if canvas.blank(row, column):
            canvas.put(row, column, symbols.cursor, "cursor")
    label = str(step)
    start = min(max(left, column - len(label) // 2), canvas.width - len(label))
    canvas.put(rows, start, label, "cursor")


def _cell(step: int, chart: Chart, canvas: Canvas, left: int, symbols: Symbols) -> int:
    dots = (canvas.width - left) * symbols.dots_x
    return left + int(column_of(np.array([step]), chart.first, chart.last, dots)[0]) // symbols.dots_x
