"""The board: it holds the runs and the view, and hands scenes to the painters. A thread reads the files."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from textual import work
from textual.app import App, ComposeResult
from textual.events import Event, Key
from textual.message import Message
from textual.widgets import Input

from miles.environment import get
from miles.record.status import RunStatus
from miles_cli.dashboard.escape_key import SOON_S, parted
from miles_cli.dashboard.follower import Follower
from miles_cli.dashboard.layout import capacity
from miles_cli.dashboard.panels import Panel
from miles_cli.dashboard.scene import Scene
from miles_cli.dashboard.screenful import Screenful, compose
from miles_cli.dashboard.snapshot import RunSnapshot
from miles_cli.dashboard.stage import Stage
from miles_cli.dashboard.symbols import Symbols
from miles_cli.dashboard.view import FULL, NORMAL, View


class BoardApp(App[None]):
    """Follows the runs and draws them. `clock` gives epoch seconds."""

    CSS = """
    Screen { background: #0f131a; color: #d7dce4; }
    ModalScreen { background: #0f131a 70%; }
    CommandPalette SearchIcon { display: none; }
    #query { display: none; dock: bottom; height: 1; border: none; background: #1d2531; padding: 0 1; }
    #query.open { display: block; }
    """

    class Told(Message):
        """New snapshots of the runs."""

        def __init__(self, runs: tuple[RunSnapshot, ...]) -> None:
            super().__init__()
            self.runs = runs

    class Trouble(Message):
        """The record could not be read just now."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    def __init__(
        self,
        run_dirs: list[Path],
        symbols: Symbols,
        clock: Callable[[], float] = time.time,
        view: View | None = None,
    ) -> None:
        # Textual turns colours into greys under NO_COLOR, unless it draws in the terminal's own colours.
        super().__init__(ansi_color=True if get("NO_COLOR") else None)
        self.symbols, self._clock = symbols, clock
        self.view = view or View()
        self.command: str | None = None
        """A command that was chosen here and has to be typed in the shell."""
        self._current = 0
        self._live = tuple(_unread(path) for path in run_dirs)
        self._frozen: tuple[RunSnapshot, ...] | None = None
        self._shown = Screenful([], ())
        self._follower = Follower(
            run_dirs,
            tell=self._tell,
            trouble=self._report,
            clock=clock,
        )

    def compose(self) -> ComposeResult:
        yield Stage()
        yield Input(placeholder="filter metrics: words, or ! and words", id="query", select_on_focus=False)

    def on_mount(self) -> None:
        self.query_one(Stage).focus()
        self._follow()
        self.set_interval(1.0, self.draw)

    def on_unmount(self) -> None:
        self._follower.stop()

    async def on_event(self, event: Event) -> None:
        if isinstance(event, Key) and not self.screen_stack:
            return  # leaving: the screen is gone before the last of its keys
        keys = parted(event)
        if keys is None or event.is_forwarded:
            await super().on_event(event)
            return
        escape, key = keys
        await super().on_event(escape)
        self.set_timer(SOON_S, lambda: self.post_message(key))

    @work(thread=True)
    def _follow(self) -> None:
        self._follower.run()

    def _tell(self, runs: tuple[RunSnapshot, ...]) -> None:
        self.post_message(self.Told(runs))

    def _report(self, text: str) -> None:
        self.post_message(self.Trouble(text))

    # -- what is shown --

    @property
    def live_runs(self) -> tuple[RunSnapshot, ...]:
        """The newest that is known, whether or not the view is held."""
        return self._live

    @property
    def scene(self) -> Scene:
        """The runs as they are shown now."""
        runs = self._live if self._frozen is None else self._frozen
        live, held = self._live[self._current], runs[self._current]
        cursor = self.view.cursor
        at = held.step or 0 if cursor is None else cursor
        return Scene(
            runs,
            self._current,
            self.view,
            self._clock(),
            self.symbols,
            frozen=self._frozen is not None,
            behind=max(0.0, live.last_time - held.last_time),
            behind_steps=max(0, (live.step or 0) - at),
        )

    def draw(self) -> None:
        """Paint the scene; cells that stay the same are not sent."""
        stage = self.screen_stack[0].query_one(Stage)
        self._shown = compose(self.scene, stage.size.width, stage.size.height)
        stage.show(self._shown.lines)

    def on_stage_resized(self) -> None:
        self.draw()

    def on_board_app_told(self, event: Told) -> None:
        # A run that was added just now may not have been read yet.
        self._live = event.runs + self._live[len(event.runs) :]
        self.draw()
        self.heard()

    def heard(self) -> None:
        """Called after there was news of the runs."""

    def add_run(self, run_dir: Path) -> None:
        """Follow one more run and bring it to the front."""
        self._live = (*self._live, _unread(run_dir))
        self._frozen = None
        self._current = len(self._live) - 1
        self._follower.add(run_dir)
        self.look(cursor=None)

    def on_board_app_trouble(self, event: Trouble) -> None:
        self.notify(event.text, title="the record cannot be read", severity="warning", timeout=4)

    def on_stage_clicked(self, event: Stage.Clicked) -> None:
        for i, (box, _) in enumerate(self._shown.places):
            if box.contains(event.x, event.y) and self.view.mode == NORMAL:
                self.look(focus=i, mode=FULL if event.times > 1 else NORMAL)
                return

    def look(self, **changes: object) -> None:
        """Change the view and draw it."""
        self.view = self.view.with_(**changes)
        self.draw()

    @property
    def capacity(self) -> int:
        size = self.screen_stack[0].query_one(Stage).size
        return capacity(size.width, size.height)

    @property
    def focused_panel(self) -> Panel | None:
        shown = self.view.shown(self.scene.run, self.capacity)
        return shown[min(self.view.focus, len(shown) - 1)][1] if shown else None


def _unread(path: Path) -> RunSnapshot:
    """What is known of a run before its record has been opened."""
    return RunSnapshot(path.name, str(path), path.name, "", RunStatus.EMPTY, 0, None, None, 0, 0.0, 0.0)
