"""The whole screen as styled lines, from a scene and a size. Nothing here knows of Textual."""

from __future__ import annotations

from dataclasses import dataclass

from miles.record.metrics import find_metric
from miles_cli.dashboard.actions import BOARD, actions_of
from miles_cli.dashboard.canvas import Line
from miles_cli.dashboard.layout import (
    EXPLAIN_ROWS,
    Box,
    board_box,
    capacity,
    panel_boxes,
    side_boxes,
)
from miles_cli.dashboard.paint import paint_panel
from miles_cli.dashboard.panels import PANELS, SIDE, Panel, matching
from miles_cli.dashboard.scene import Scene, cut
from miles_cli.dashboard.strip import alert_bar, header, phase_bar
from miles_cli.dashboard.view import FULL


@dataclass(frozen=True)
class Screenful:
    """`lines` fill the screen; `places` says which panel of the board stands where, in order of focus."""

    lines: list[Line]
    places: tuple[tuple[Box, Panel], ...]


def compose(scene: Scene, width: int, height: int) -> Screenful:
    """Everything that is on the screen of `width` x `height` cells."""
    shown = scene.view.shown(scene.run, capacity(width, height))
    board = board_box(width, height)
    focus = min(scene.view.focus, max(0, len(shown) - 1))
    explained = scene.view.mode == FULL and bool(shown) and board.height > 3 * EXPLAIN_ROWS
    if explained:
        board = Box(board.x, board.y, board.width, board.height - EXPLAIN_ROWS)
    boxes = panel_boxes(len(shown), board, scene.view.mode, focus)
    painted = [
        (box, paint_panel(panel, number, scene, box.width, box.height, i == focus))
        for i, ((number, panel), box) in enumerate(zip(shown, boxes, strict=True))
        if box is not None
    ]
    for name, box in zip(SIDE, side_boxes(width, height), strict=False):
        painted.append((box, paint_panel(PANELS[name], 0, scene, box.width, box.height, False)))
    if explained:
        below = Box(board.x, board.y + board.height, board.width, EXPLAIN_ROWS)
        painted.append((below, explanation(shown[focus][1], scene, below.width, below.height)))
    if not shown:
        painted.append((board, _nothing(scene, board)))
    rows = [*header(scene, width), phase_bar(scene, width)]
    rows += _assemble(painted, len(rows), height - 2, width)
    rows += [alert_bar(scene, width), footer(width)]
    places = tuple((box, shown[i][1]) for i, box in enumerate(boxes) if box is not None)
    return Screenful([cut(row, width) for row in rows[:height]], places)


def footer(width: int) -> Line:
    """The most used keys, as many as fit."""
    line: Line = []
    for action in actions_of(BOARD):
        if not action.footer:
            continue
        entry: Line = [(f" {action.shown_keys.split()[0]} ", "key"), (f"{action.footer} ", "axis")]
        if sum(len(text) for text, _ in line + entry) > width:
            break
        line += entry
    return cut(line, width)


def explanation(panel: Panel, scene: Scene, width: int, height: int) -> list[Line]:
    """What the panel's first metric means, what is healthy, what moves it."""
    names = matching(panel.metrics, scene.run.tracks)
    metric = find_metric(names[0]) if names else None
    if metric is None:
        return [cut([], width)] * height
    unit = f" [{metric.unit}]" if metric.unit else ""
    healthy = (
        scene.symbols.plain(str(metric.healthy))
        if metric.healthy
        else "no fixed range: judged against its own past"
    )
    rows: list[Line] = [
        [(f" {metric.name}", "strong"), (unit, "axis")],
        [(f" {metric.meaning}", "label")],
        [(" healthy ", "axis"), (healthy, "label")],
        [(" moved by ", "axis"), (metric.moved_by, "label")],
    ]
    return [cut(row, width) for row in rows[:height]]


def _nothing(scene: Scene, board: Box) -> list[Line]:
    """An empty board says what to do next."""
    view = scene.view
    if view.query:
        said = f"no metric matches {view.query!r}: escape shows the panels again"
    elif not scene.run.tracks:
        said = "waiting for the first step"
    else:
        said = "every panel is switched off: 1 to 9 bring them back, p shows the next preset"
    lines: list[Line] = [cut([], board.width) for _ in range(board.height)]
    lines[board.height // 2] = cut([(said.center(board.width), "axis")], board.width)
    return lines


def _assemble(painted: list[tuple[Box, list[Line]]], top: int, bottom: int, width: int) -> list[Line]:
    """Boxes side by side as whole rows. Boxes do not overlap; what none covers is blank."""
    rows: list[Line] = []
    ordered = sorted(painted, key=lambda item: item[0].x)
    for y in range(top, bottom):
        line: Line = []
        x = 0
        for box, lines in ordered:
            if box.y <= y < box.y + box.height:
                line += [(" " * (box.x - x), "")] if box.x > x else []
                line += lines[y - box.y]
                x = box.x + box.width
        rows.append(cut(line, width) if x < width else line)
    return rows
