"""Where each box of the screen stands: pure arithmetic from a size, a mode and a number of panels."""

from __future__ import annotations

from dataclasses import dataclass

from miles_cli.dashboard.view import FULL, HALF

HEAD_ROWS, FOOT_ROWS = 3, 2
"""Header and phase bar above the board; alert bar and keys below."""
MIN_PANEL_ROWS = 9
SIDE_FROM, SIDE_WIDTH = 180, 60
EXPLAIN_ROWS = 4
"""What a metric means, under a panel on the whole board."""


@dataclass(frozen=True)
class Box:
    """A rectangle of cells; `x`, `y` is its top left corner."""

    x: int
    y: int
    width: int
    height: int

    def contains(self, x: int, y: int) -> bool:
        return self.x <= x < self.x + self.width and self.y <= y < self.y + self.height


def board_box(width: int, height: int) -> Box:
    """Everything between the bars, without the side column."""
    side = SIDE_WIDTH if width >= SIDE_FROM else 0
    return Box(0, HEAD_ROWS, width - side, max(1, height - HEAD_ROWS - FOOT_ROWS))


def side_boxes(width: int, height: int, weights: tuple[int, ...] = (3, 2, 4)) -> list[Box]:
    """The boxes beside the board, none where the screen is too narrow."""
    if width < SIDE_FROM:
        return []
    board = board_box(width, height)
    edges = _edges(board.height, sum(weights))
    boxes, used = [], 0
    for weight in weights:
        top, bottom = edges[used], edges[used + weight]
        boxes.append(Box(board.width, board.y + top, SIDE_WIDTH, bottom - top))
        used += weight
    return boxes


def columns_for(width: int) -> int:
    return 1 if width < 60 else 2 if width < 135 else 3


def capacity(width: int, height: int) -> int:
    """Panels that fit the board at a readable size."""
    board = board_box(width, height)
    return min(12, columns_for(board.width) * max(1, board.height // MIN_PANEL_ROWS))


def panel_boxes(count: int, board: Box, mode: str, focus: int) -> list[Box | None]:
    """A box per panel in order; None for one that the mode hides."""
    if not count:
        return []
    focus = min(focus, count - 1)
    if mode == FULL:
        return [board if i == focus else None for i in range(count)]
    if mode == HALF and count > 1:
        upper = Box(board.x, board.y, board.width, board.height // 2)
        lower = Box(board.x, board.y + upper.height, board.width, board.height - upper.height)
        fitting = columns_for(board.width) * max(1, lower.height // MIN_PANEL_ROWS)
        others = iter(_grid(min(count - 1, fitting), lower))
        return [upper if i == focus else next(others, None) for i in range(count)]
    return list(_grid(count, board))


def _grid(count: int, area: Box) -> list[Box]:
    """`count` boxes in rows; those of a row share its width, so that none stays empty."""
    columns = min(columns_for(area.width), count)
    rows = -(-count // columns)
    ys = _edges(area.height, rows)
    boxes = []
    for row in range(rows):
        members = min(columns, count - row * columns)
        xs = _edges(area.width, members)
        for column in range(members):
            boxes.append(
                Box(
                    area.x + xs[column],
                    area.y + ys[row],
                    xs[column + 1] - xs[column],
                    ys[row + 1] - ys[row],
                )
            )
    return boxes


def _edges(length: int, parts: int) -> list[int]:
    return [length * i // parts for i in range(parts + 1)]
