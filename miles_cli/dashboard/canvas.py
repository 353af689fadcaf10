"""A grid of character cells with a style each, filled by painters and read as runs of equal style."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

Run = tuple[str, str]
"""Text and the name of its style."""
Line = list[Run]


class Canvas:
    """`width` x `height` cells; row 0 is the top."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._chars = np.full((height, width), " ", dtype="<U1")
        self._styles = np.zeros((height, width), np.int32)
        self._names = [""]

    def style(self, name: str) -> int:
        if name not in self._names:
            self._names.append(name)
        return self._names.index(name)

    def put(self, row: int, column: int, text: str, style: str = "") -> None:
        """Write `text` from `column` on; what does not fit is cut off."""
        start, end = max(0, column), min(self.width, column + len(text))
        if not 0 <= row < self.height or start >= end:
            return
        self._chars[row, start:end] = list(text[start - column : end - column])
        self._styles[row, start:end] = self.style(style)

    def stamp(self, row: int, column: int, codes: np.ndarray, glyphs: str, style: str) -> None:
        """Draw dot patterns `[rows, columns]` from that corner on; pattern 0 leaves its cell alone."""
        rows, columns = codes.shape
        inked = codes > 0
        chars = np.array(list(glyphs))[codes]
        block = (slice(row, row + rows), slice(column, column + columns))
        self._chars[block] = np.where(inked, chars, self._chars[block])
        self._styles[block] = np.where(inked, self.style(style), self._styles[block])

    def blank(self, row: int, column: int) -> bool:
        return bool(self._chars[row, column] == " ")

    def fade(self, columns: slice, rows: slice, style: str) -> None:
        """Give every inked cell of the region another style."""
        region = self._styles[rows, columns]
        region[self._chars[rows, columns] != " "] = self.style(style)

    def tint(self, rows: slice, columns: slice, ground: str) -> None:
        """Put the region on the background `ground`: every style `s` there becomes `s+ground`."""
        region = self._styles[rows, columns]
        for style in np.unique(region):
            region[region == style] = self.style(f"{self._names[style]}+{ground}")

    def lines(self) -> list[Line]:
        return [self._line(row) for row in range(self.height)]

    def _line(self, row: int) -> Line:
        styles, text = self._styles[row], "".join(self._chars[row])
        cuts = [0, *(np.flatnonzero(np.diff(styles)) + 1).tolist(), self.width]
        return [(text[a:b], self._names[styles[a]]) for a, b in pairwise(cuts) if b > a]
