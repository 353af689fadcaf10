"""Where boxes stand: nothing overlaps, nothing sticks out, and each size shows what it should."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest

from miles_cli.dashboard.layout import Box, board_box, capacity, panel_boxes, side_boxes
from miles_cli.dashboard.scene import Scene
from miles_cli.dashboard.screenful import compose
from miles_cli.dashboard.strip import header
from miles_cli.dashboard.view import FULL, HALF, MODES, NORMAL, View


def overlap(a: Box, b: Box) -> bool:
    return a.x < b.x + b.width and b.x < a.x + a.width and a.y < b.y + b.height and b.y < a.y + a.height


@pytest.mark.parametrize("size", [(40, 12), (80, 24), (100, 30), (120, 40), (160, 45), (200, 60), (250, 80)])
@pytest.mark.parametrize("mode", MODES)
def test_boxes_neither_overlap_nor_stick_out(size: tuple[int, int], mode: str) -> None:
    board = board_box(*size)
    for count in range(1, capacity(*size) + 1):
        boxes = [box for box in panel_boxes(count, board, mode, focus=0) if box is not None]
        boxes += side_boxes(*size)
        assert not any(overlap(a, b) for a, b in combinations(boxes, 2))
        assert all(b.x + b.width <= size[0] and b.y + b.height <= board.y + board.height for b in boxes)


def test_what_fits_at_each_size() -> None:
    assert [capacity(80, 24), capacity(120, 40), capacity(200, 60) >= 9] == [4, 6, True]
    assert len(side_boxes(200, 60)) == 3
    assert side_boxes(160, 45) == []


def test_the_grid_leaves_no_hole() -> None:
    board = board_box(120, 40)
    for count in (1, 3, 5, 6):
        boxes = [b for b in panel_boxes(count, board, NORMAL, 0) if b]
        assert sum(b.width * b.height for b in boxes) == board.width * board.height


def test_zoom_shows_one_panel_and_half_keeps_the_others() -> None:
    board = board_box(120, 40)
    assert panel_boxes(6, board, FULL, 2) == [None, None, board, None, None, None]
    half = panel_boxes(6, board, HALF, 2)
    assert half[2] is not None
    assert half[2].width == board.width
    assert sum(box is not None for box in half) >= 3


@pytest.mark.parametrize("size", [(20, 5), (40, 12), (80, 24), (81, 25), (120, 40), (200, 60), (301, 90)])
def test_every_screen_fills_its_size_exactly(scene: Scene, size: tuple[int, int]) -> None:
    for view in (View(), View(preset="moe"), View(mode=FULL), View(mode=HALF), View(query="zzz")):
        shown = compose(Scene((scene.run,), 0, view, scene.now, scene.symbols), *size)
        assert len(shown.lines) == size[1]
        assert {sum(len(text) for text, _ in line) for line in shown.lines} == {size[0]}


@pytest.mark.parametrize("width", [24, 30, 40, 60, 80])
@pytest.mark.parametrize("runs", [1, 2])
def test_the_header_tells_the_step_at_any_width(scene: Scene, width: int, runs: int) -> None:
    """Beside the name that a run gives itself, which is told by its end where it does not fit."""
    run = replace(scene.run, name="quickstart-20261129-203714")
    first, _ = header(replace(scene, runs=(run,) * runs), width)
    told = "".join(part for part, _ in first)
    assert "step 120/120" in told and len(told) == width
    assert runs == 2 or width < 30 or "-203714" in told
