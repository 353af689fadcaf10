"""Every golden frame: which screens, at which sizes, with which symbols. Run it to draw them anew.

python tests/cpu/dashboard/frames.py
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from miles_cli.dashboard.feed import RunFeed
from miles_cli.dashboard.panels import PRESETS
from miles_cli.dashboard.scene import Scene
from miles_cli.dashboard.screenful import compose
from miles_cli.dashboard.snapshot import RunSnapshot
from miles_cli.dashboard.symbols import LADDER
from miles_cli.dashboard.view import FULL, HALF, View
from miles_cli.dashboard.watch_app import WatchApp

FIXTURES = Path(__file__).parents[2] / "fixtures"
RUN = FIXTURES / "dashboard_run"
"""Written by a script: has a bit of everything."""
REAL_RUN = FIXTURES / "collapsing_run"
"""The quickstart with too high a learning rate, as it was recorded."""
PPO_RUN = FIXTURES / "ppo_run"
"""The quickstart with a critic, as it was recorded."""
GOLDEN = Path(__file__).parent / "golden"
SIZES = ((80, 24), (120, 40), (200, 60))
VIEWS = {
    **{preset: View(preset=preset) for preset in PRESETS if preset != "critic"},
    "zoomed": View(focus=1, mode=FULL),
    "half": View(focus=1, mode=HALF),
    "inspected": View(cursor=87),
    "filtered": View(query="flip layer"),
    "log-scale": View(preset="numerics", log=True, window=50),
}
SETTLES_WITHIN_S = 300
"""On the busiest machine."""
REAL, PPO = "real-", "ppo-"
"""Prefixes of the frames of the real runs."""
PPO_VIEWS = {"ppo-overview": View(), "ppo-critic": View(preset="critic")}
WINDOWS = {"alerts": "a", "fix": "f", "samples": "w", "log": "o", "help": "question_mark", "explain": "i"}


@cache
def snapshot(run: Path = RUN) -> RunSnapshot:
    return RunFeed(run).snapshot()


def at_rest(run: Path = RUN) -> float:
    """Two seconds after the last event of the recorded run."""
    return snapshot(run).last_time + 2


def board_cases() -> Iterator[tuple[str, int, int, str]]:
    """(view, width, height, symbols): every view in braille, and the presets in ASCII and blocks."""
    for width, height in SIZES:
        for name in VIEWS:
            yield name, width, height, "braille"
        yield "overview", width, height, "ascii"
        yield "moe", width, height, "ascii"
        yield "real-overview", width, height, "braille"
        yield "real-moe", width, height, "braille"
        yield "real-incident", width, height, "ascii"
        for name in PPO_VIEWS:
            yield name, width, height, "braille"
    yield "overview", 120, 40, "block"


def board_frame(name: str, width: int, height: int, symbols: str) -> str:
    run = REAL_RUN if name.startswith(REAL) else PPO_RUN if name.startswith(PPO) else RUN
    view = (VIEWS | PPO_VIEWS)[name.removeprefix(REAL)]
    scene = Scene((snapshot(run),), 0, view, at_rest(run), LADDER[symbols], frozen=view.cursor is not None)
    return _text(compose(scene, width, height).lines)


def _text(lines: list[list[tuple[str, str]]]) -> str:
    return "\n".join("".join(text for text, _ in line).rstrip() for line in lines) + "\n"


def window_cases() -> Iterator[tuple[int, int, str, Path]]:
    for width, height in SIZES:
        yield width, height, "braille", RUN
        yield width, height, "braille", REAL_RUN
    yield 80, 24, "ascii", RUN


async def window_frames(width: int, height: int, symbols: str, run: Path) -> dict[str, str]:
    """All windows of one size, opened one after the other, by the name of their golden file."""
    app = WatchApp([run], LADDER[symbols], clock=lambda: at_rest(run))
    prefix = "window-" + (REAL if run == REAL_RUN else "")
    found = {}
    async with app.run_test(size=(width, height)) as pilot:
        await settled(pilot)
        for name, key in WINDOWS.items():
            await pilot.press(key)
            await settled(pilot)
            found[board_file(prefix + name, width, height, symbols)] = screen_text(app)
            await pilot.press("escape")
            await pilot.pause()
    return found


async def until(pilot, condition: Callable[[], bool]) -> None:  # type: ignore[no-untyped-def]
    """Wait for something that the dashboard does by itself."""
    deadline = time.monotonic() + SETTLES_WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await pilot.pause(0.02)


async def settled(pilot) -> None:  # type: ignore[no-untyped-def]
    """Wait until the run has been read and the windows have loaded what they show."""
    deadline = time.monotonic() + SETTLES_WITHIN_S
    while True:
        await pilot.pause()
        busy = [w for w in pilot.app.workers if w.is_running and w.name != "_follow"]
        if pilot.app.scene.run.tracks and not busy:
            break
        assert time.monotonic() < deadline, f"it did not settle: {busy}"
        await asyncio.sleep(0.01)
    await pilot.pause()


def screen_text(app: WatchApp) -> str:
    """What stands on the terminal, windows included."""
    strips = app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in strip).rstrip() for strip in strips) + "\n"


def all_frames() -> Iterator[tuple[str, str]]:
    """(file name, text) of every golden frame."""
    for name, width, height, symbols in board_cases():
        yield board_file(name, width, height, symbols), board_frame(name, width, height, symbols)
    for case in window_cases():
        yield from asyncio.run(window_frames(*case)).items()


def board_file(name: str, width: int, height: int, symbols: str) -> str:
    return f"{name}-{width}x{height}-{symbols}.txt"


if __name__ == "__main__":
    os.environ |= {"TZ": "UTC", "MILES_RUNS_DIR": str(RUN.parent)}
    time.tzset()
    GOLDEN.mkdir(exist_ok=True)
    for old in GOLDEN.glob("*.txt"):
        old.unlink()
    for file, text in all_frames():
        (GOLDEN / file).write_text(text)
