"""The log window: events in words and the ends of the workers' logs, merged by time."""

from __future__ import annotations

from textual import work
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.message import Message
from textual.widgets import Input, Static

from miles_cli.dashboard.actions import LIST, LOGS
from miles_cli.dashboard.logtail import read_tails
from miles_cli.dashboard.paint_lists import log_matches, log_row
from miles_cli.dashboard.snapshot import LogLine
from miles_cli.dashboard.text import rich_text
from miles_cli.dashboard.windows import Window, bindings

SHOWN = 1_000
"""Lines in the window; older ones are found with a filter."""


class LogWindow(Window):
    """Follows the end until told to stay."""

    SCOPE, HEADING = LOGS, "log"
    BINDINGS = bindings(LIST, LOGS)

    class Tails(Message):
        """The workers' logs have been read."""

        def __init__(self, lines: list[LogLine]) -> None:
            super().__init__()
            self.lines = lines

    def __init__(self) -> None:
        super().__init__()
        self._tails: list[LogLine] = []
        self._following = True

    def body(self) -> ComposeResult:
        yield Input(placeholder="filter: words, or ! and words", id="filter", classes="hidden")
        with VerticalScroll(id="lines"):
            yield Static(id="log")

    def on_mount(self) -> None:
        self.query_one("#lines").focus()
        self._show()
        self._read()
        self.set_interval(1.0, self._read)

    @work(thread=True, exclusive=True)
    def _read(self) -> None:
        self.post_message(self.Tails(read_tails(self.watch_app.scene.run.path)))

    def on_log_window_tails(self, event: Tails) -> None:
        self._tails = event.lines
        if self._following:
            self._show()

    def _show(self) -> None:
        query = self.query_one(Input).value
        scene = self.watch_app.scene
        merged = sorted([*scene.run.log, *self._tails], key=lambda line: line.time)
        found = [line for line in merged if log_matches(line, query)]
        rows = [log_row(line, scene) for line in found[-SHOWN:]]
        self.query_one("#log", Static).update(rich_text(rows or [[("no line matches", "axis")]]))
        state = "following" if self._following else "staying"
        self.query_one("#window").border_title = f"log: {len(found)} of {len(merged)} lines, {state}"
        if self._following:
            self.query_one("#lines", VerticalScroll).scroll_end(animate=False)

    def action_toggle_tail(self) -> None:
        self._following = not self._following
        self._show()

    def action_filter_logs(self) -> None:
        self.query_one(Input).remove_class("hidden")
        self.query_one(Input).focus()

    def on_input_changed(self) -> None:
        self._show()

    def on_input_submitted(self) -> None:
        self.query_one("#lines").focus()
