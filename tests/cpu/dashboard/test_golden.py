"""Golden frames: every screen at 80x24, 120x40 and 200x60, in braille and in ASCII, and without colour.

After an intended change draw them anew with `python tests/cpu/dashboard/frames.py` and read the difference.
"""

from __future__ import annotations

import asyncio
import difflib
from pathlib import Path

import pytest
from frames import (
    GOLDEN,
    RUN,
    at_rest,
    board_cases,
    board_file,
    board_frame,
    settled,
    window_cases,
    window_frames,
)

from miles_cli.dashboard.symbols import BRAILLE
from miles_cli.dashboard.watch_app import WatchApp


def check(file: str, text: str) -> None:
    golden = (GOLDEN / file).read_text()
    changes = difflib.unified_diff(golden.splitlines(), text.splitlines(), "golden", "now", n=0, lineterm="")
    assert text == golden, f"{file}\n" + "\n".join(changes)


@pytest.mark.parametrize("case", list(board_cases()), ids=lambda c: board_file(*c))
def test_board(case: tuple[str, int, int, str]) -> None:
    text = board_frame(*case)
    check(board_file(*case), text)
    if case[3] == "ascii":
        assert text.isascii()


@pytest.mark.parametrize("case", list(window_cases()), ids=lambda c: f"{c[0]}x{c[1]}-{c[2]}-{c[3].name}")
def test_windows(case: tuple[int, int, str, Path]) -> None:
    for file, text in asyncio.run(window_frames(*case)).items():
        check(file, text)
        if case[2] == "ascii":
            assert text.isascii(), file


def test_no_golden_frame_is_left_over() -> None:
    known = {board_file(*case) for case in board_cases()}
    on_disk = {path.name for path in GOLDEN.glob("*.txt") if not path.name.startswith("window-")}
    assert on_disk == known


def test_without_colour_the_same_frame_is_drawn_and_no_colour_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    async def colours() -> tuple[str, set[str]]:
        app = WatchApp([RUN], BRAILLE, clock=at_rest)
        async with app.run_test(size=(120, 40)) as pilot:
            await settled(pilot)
            used = set()
            for strip in app.screen._compositor.render_strips():
                for line_filter in app._filters:
                    strip = strip.apply_filter(line_filter, app.screen.background_colors[1])
                styles = [segment.style for segment in strip if segment.style]
                used |= {str(c.name) for s in styles for c in (s.color, s.bgcolor) if c is not None}
            return app.query_one("#stage").plain() + "\n", used

    text, used = asyncio.run(colours())
    check(board_file("overview", 120, 40, "braille"), text)
    assert used <= {"default"}
