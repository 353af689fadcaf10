"""The fixes of an alert as differences of the configuration, and what becomes of the one that is applied."""

from __future__ import annotations

from pathlib import Path

from textual import work
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.message import Message
from textual.widgets import Static

from miles.errors import RunError
from miles_cli.dashboard import fixes, mending
from miles_cli.dashboard.actions import FIX, LIST
from miles_cli.dashboard.canvas import Line
from miles_cli.dashboard.snapshot import Alert, RunSnapshot
from miles_cli.dashboard.text import hanging
from miles_cli.dashboard.windows import Window, bindings


class FixWindow(Window):
    """One fix at a time: what would change, how it is applied, and the command that does the same."""

    SCOPE, HEADING = FIX, "fix"
    BINDINGS = bindings(LIST, FIX)
    REFRESH = 0.25
    """Seconds between looks at a fix under way."""

    class Assessed(Message):
        """The fixes as the run stands now."""

        def __init__(self, remedies: list[fixes.Remedy]) -> None:
            super().__init__()
            self.remedies = remedies

    def __init__(self, alert: Alert, run: RunSnapshot) -> None:
        super().__init__()
        self._alert, self._run = alert, run
        self._remedies: list[fixes.Remedy] | None = None
        self._at = 0
        self._told: list[Line] = []

    def on_mount(self) -> None:
        self._assess()
        self.set_interval(self.REFRESH, self._follow)

    @work(thread=True)
    def _assess(self) -> None:
        self.post_message(self.Assessed(fixes.present_remedies(self._alert, Path(self._run.path))))

    def on_fix_window_assessed(self, event: Assessed) -> None:
        self._remedies = event.remedies
        self._refresh()

    def _follow(self) -> None:
        """Show what has become of the fix that was applied."""
        current = self.watch_app.mending
        if current is not None and current.path == self._run.path:
            self._refresh([(current.text, current.state)])

    @property
    def _remedy(self) -> fixes.Remedy | None:
        return self._remedies[self._at] if self._remedies else None

    def body(self) -> ComposeResult:
        with VerticalScroll():
            yield Static(hanging(self._lines(), 1), id="fix")

    def _lines(self) -> list[Line]:
        head: Line = [(self._alert.rule, self._alert.severity), ("  ", ""), (self._alert.title, "strong")]
        remedy, run = self._remedy, self._run
        if self._remedies is None:
            return [head, [], [("assessing the run as it stands now", "axis")]]
        if remedy is None:
            return [head, [], [("this rule proposes no fix", "axis")]]
        lines: list[Line] = [head, []]
        lines.append([(f"{self._at + 1} of {len(self._remedies)}  ", "key"), (remedy.text, "label")])
        lines.append([("risk      ", "axis"), (remedy.risk or "none known", "label")])
        lines.append([("applied   ", "axis"), (fixes.way(remedy, run), "label")])
        if remedy.changes_config:
            lines += [[], *fixes.difference(remedy, run.config)]
        typed = fixes.command(remedy, run)
        if typed is not None:
            lines += [[], [("the same, typed:", "axis")], [(typed, "value")]]
        return [*lines, [], *self._told]

    def _refresh(self, *told: Line) -> None:
        self._told = list(told)
        self.query_one("#fix", Static).update(hanging(self._lines(), 1))

    def _turn(self, by: int) -> None:
        self._at = (self._at + by) % max(1, len(self._remedies or ()))
        self._refresh()

    def action_next_fix(self) -> None:
        self._turn(1)

    def action_previous_fix(self) -> None:
        self._turn(-1)

    def action_copy(self) -> None:
        typed = fixes.command(self._remedy, self._run) if self._remedy else None
        if typed is None:
            self._refresh([("there is no command to copy", "warning")])
            return
        self.app.copy_to_clipboard(typed)
        self._refresh([("copied", "good")])

    def action_apply(self) -> None:
        """Apply the shown fix to the run as it stands at this moment."""
        remedy = self._remedy
        if remedy is None or fixes.command(remedy, self._run) is None:
            self._refresh([("nothing to apply here: this is for you to do", "warning")])
            return
        try:
            self.watch_app.mend(remedy, self._run.path)
        except RunError as error:
            self._refresh([(str(error), mending.FAILED)])
            return
        self._follow()
