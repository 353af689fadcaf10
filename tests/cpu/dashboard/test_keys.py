"""The dashboard under a pilot: every key is pressed, and each does what the table says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from frames import RUN, at_rest, screen_text, settled, until
from textual.events import Key

from miles_cli.dashboard.actions import ACTIONS, BOARD, actions_of
from miles_cli.dashboard.alerts_window import AlertsWindow, FixWindow
from miles_cli.dashboard.logs_window import LogWindow
from miles_cli.dashboard.samples_window import SamplesWindow
from miles_cli.dashboard.stage import Stage
from miles_cli.dashboard.symbols import BRAILLE
from miles_cli.dashboard.watch_app import WatchApp
from miles_cli.dashboard.windows import ConfirmWindow, TextWindow


def drive(script: Callable[..., Awaitable[None]], runs: list[Path] | None = None, size=(120, 40)) -> WatchApp:  # type: ignore[no-untyped-def]
    """Run `script(pilot, app)` on a dashboard that has read its runs."""

    async def main() -> WatchApp:
        app = WatchApp(runs or [RUN], BRAILLE, clock=at_rest)
        async with app.run_test(size=size) as pilot:
            await settled(pilot)
            await script(pilot, app)
        return app

    return asyncio.run(main())


def shown(app: WatchApp) -> str:
    return app.screen_stack[0].query_one(Stage).plain()


def test_every_key_of_the_board_leaves_a_working_screen() -> None:
    async def walk(pilot, app: WatchApp) -> None:  # type: ignore[no-untyped-def]
        for action in actions_of(BOARD):
            for key in action.keys if action.id not in ("quit", "suspend_process") else ():
                await pilot.press(key)
                while len(app.screen_stack) > 1:
                    await pilot.press("escape")
                if app.query_one("#query").has_class("open"):
                    await pilot.press("escape")
                await pilot.pause()
                assert app.is_running
                assert len(shown(app).splitlines()) == 24, key

    drive(walk, size=(80, 24))


def test_every_key_of_the_windows() -> None:
    async def walk(pilot, app: WatchApp) -> None:  # type: ignore[no-untyped-def]
        for opener, scope in (
            ("a", "alerts"),
            ("f", "fix"),
            ("w", "samples"),
            ("o", "logs"),
            ("X", "confirm"),
        ):
            for action in (a for a in ACTIONS if a.scope == scope):
                await pilot.press(opener)
                assert len(app.screen_stack) == 2
                await pilot.press(*action.keys[:1])
                while len(app.screen_stack) > 1:
                    await pilot.press("escape")
                await pilot.press("end")

    drive(walk, size=(80, 24))


def test_presets_panels_zoom_and_back() -> None:
    async def script(pilot, app: WatchApp) -> None:  # type: ignore[no-untyped-def]
        await pilot.press("p", "p")
        assert "1 flips by layer" in shown(app)
        await pilot.press("1")
        assert "1 flips by layer" not in shown(app)
        await pilot.press("1", "tab", "z")
        assert "moved by" in shown(app)
        await pilot.press("escape")
        assert app.view.mode == "normal"
        await pilot.press("plus")
        assert app.view.mode == "half"
        await pilot.press("plus", "underscore", "underscore")
        assert app.view.mode == "normal"

    drive(script)


def test_focus_goes_round_and_never_sticks() -> None:
    async def script(pilot, app: WatchApp) -> None:  # type: ignore[no-untyped-def]
        for _ in range(6):
            await pilot.press("right")
        assert app.view.focus == 0
        await pilot.press("shift+tab")
        assert app.view.focus == 5

    drive(script)


def test_scrubbing_goes_by_steps_and_by_alerts_and_back_to_live() -> None:
    async def script(pilot, app: WatchApp) -> None:  # type: ignore[no-untyped-def]
        await pilot.press("comma")
        assert app.view.cursor == 119
        await pilot.press("less_than_sign", "less_than_sign")
        assert app.view.cursor == 103
        await pilot.press("less_than_sign")
        assert app.view.cursor == 87
        assert "grad norm ✗ NaN" in shown(app)
        await pilot.press("greater_than_sign", "full_stop")
        assert app.view.cursor == 104
        await pilot.press("home")
        assert app.view.cursor == 0
        await pilot.press("end")
        assert app.view.cursor is None
        assert "replay step" not in shown(app)

    drive(script)


def test_a_filter_is_typed_live_and_cleared_by_escape() -> None:
    async def script(pilot, app: WatchApp) -> None:  # type: ignore[no-untyped-def]
        await pilot.press("slash", *"zero", "space", *"overlap")
        assert "route/zero_overlap_frac" in shown(app)
        assert "log-prob gap" not in shown(app).splitlines()[3]
        await pilot.press("enter", "tab", "escape")
        assert app.view.query == ""
        assert "2 log-prob gap" in shown(app)

    drive(script)


def test_the_palette_finds_a_layer_and_shows_it() -> None:
    async def script(pilot, app: WatchApp) -> None:  # type: ignore[no-untyped-def]
        await pilot.press("colon", *"layer 2")
        await until(pilot, lambda: "layer_2" in screen_text(app))
        await pilot.press("enter")
        await until(pilot, lambda: app.view.pinned == ("route/flip_frac/layer_2",))
        assert "counted from 0" in shown(app)

    drive(script)


def test_windows_open_on_their_keys() -> None:
    async def script(pilot, app: WatchApp) -> None:  # type: ignore[no-untyped-def]
        for key, window in {
            "question_mark": TextWindow, "i": TextWindow, "a": AlertsWindow, "f": FixWindow,
            "w": SamplesWindow, "o": LogWindow, "X": ConfirmWindow,
        }.items():  # fmt: skip
            await pilot.press(key)
            assert isinstance(app.screen, window)
            await pilot.press("escape")

    drive(script)


def test_escape_and_a_key_in_one_packet_are_two_keys() -> None:
    async def script(pilot, app: WatchApp) -> None:  # type: ignore[no-untyped-def]
        for event, reached in ((Key("alt+a", "a"), AlertsWindow), (Key("alt+shift+x", "X"), ConfirmWindow)):
            await pilot.press("f")
            assert isinstance(app.screen, FixWindow)
            app.post_message(event)
            await until(pilot, lambda window=reached: isinstance(app.screen, window))
            await pilot.press("escape")
        await pilot.press("slash", "g")
        app.post_message(Key("alt+q", "q"))
        await until(pilot, lambda: not app.is_running)
        assert app.view.query == ""

    drive(script)


def test_samples_are_browsed_and_filtered() -> None:
    async def script(pilot, app: WatchApp) -> None:  # type: ignore[no-untyped-def]
        await pilot.press("w")
        await settled(pilot)
        assert "samples of step 120: 6 of 6" in screen_text(app)
        await pilot.press("comma")
        await settled(pilot)
        assert "samples of step 110" in screen_text(app)
        await pilot.press("full_stop", "n")
        await settled(pilot)
        assert "12001" in screen_text(app)
        await pilot.press("slash", *"truncated")
        await settled(pilot)
        assert "1 of 6" in screen_text(app)

    drive(script)


def test_an_alert_leads_to_its_step() -> None:
    async def script(pilot, app: WatchApp) -> None:  # type: ignore[no-untyped-def]
        await pilot.press("a", "down", "down", "g")
        await pilot.pause()
        assert app.view.cursor == 87

    drive(script)


def test_the_next_run_comes_to_the_front(live_run: Path) -> None:
    async def script(pilot, app: WatchApp) -> None:  # type: ignore[no-untyped-def]
        assert "[● sort-moe]" in shown(app)
        await pilot.press("right_square_bracket")
        assert app.scene.run.run_id == "live"
        await pilot.press("left_square_bracket")
        assert app.scene.run.run_id == RUN.name

    drive(script, [RUN, live_run])


def test_a_click_focuses_a_panel_and_a_double_click_zooms() -> None:
    async def script(pilot, app: WatchApp) -> None:  # type: ignore[no-untyped-def]
        await pilot.click(offset=(80, 20))
        assert app.view.focus == 3
        await pilot.double_click(offset=(80, 20))
        assert app.view.mode == "full"

    drive(script)


def test_quitting_leaves_a_summary() -> None:
    from miles_cli.dashboard.farewell import farewell

    async def script(pilot, app: WatchApp) -> None:  # type: ignore[no-untyped-def]
        await pilot.press("q")

    app = drive(script)
    told = "\n".join(farewell(app.scene.runs, "miles runs resume x"))
    assert "sort-moe: finished, step 120 of 120" in told
    assert "warning: MM6" in told
    assert "not seen to be done: miles runs resume x" in told
