"""`miles watch`: the board with its windows, its command line and the requests it sends to a run."""

from __future__ import annotations

from miles.errors import RunError
from miles.record import post_request
from miles.record.status import RunStatus
from miles_cli.dashboard.actions import ALERTS, BOARD, CONFIRM, FIX, LIST, LOGS, SAMPLES
from miles_cli.dashboard.alerts_window import AlertsWindow
from miles_cli.dashboard.board_keys import BoardKeys
from miles_cli.dashboard.fix_window import FixWindow
from miles_cli.dashboard.fixes import Remedy, command
from miles_cli.dashboard.logs_window import LogWindow
from miles_cli.dashboard.mending import GOOD, Mending, begin
from miles_cli.dashboard.palette import DashboardCommands
from miles_cli.dashboard.samples_window import SamplesWindow
from miles_cli.dashboard.screenful import explanation
from miles_cli.dashboard.windows import ConfirmWindow, TextWindow, bindings, keys_lines


class WatchApp(BoardKeys):
    """The dashboard."""

    TITLE = "miles watch"
    BINDINGS = bindings(BOARD)
    COMMANDS = frozenset({DashboardCommands})  # type: ignore[assignment]
    COMMAND_PALETTE_BINDING = "ctrl+backslash"
    mending: Mending | None = None
    """The fix that was applied last."""

    # -- windows --

    def action_help(self) -> None:
        self.push_screen(TextWindow("keys", keys_lines(BOARD, LIST, ALERTS, FIX, SAMPLES, LOGS, CONFIRM), 2))

    def action_palette(self) -> None:
        self.action_command_palette()

    def action_explain(self) -> None:
        panel = self.focused_panel
        if panel is not None:
            self.push_screen(TextWindow(panel.title, explanation(panel, self.scene, 110, 4), 0))

    def action_alerts(self) -> None:
        self.push_screen(AlertsWindow(self.scene.run))

    def action_fix(self) -> None:
        run = self.scene.run
        if run.open_alerts:
            self.push_screen(FixWindow(run.open_alerts[0], run))
        else:
            self.notify("no alert is open, so there is nothing to fix", timeout=3)

    def action_samples(self) -> None:
        self.push_screen(SamplesWindow(self.scene.run.path, self.view.cursor))

    def action_logs(self) -> None:
        self.push_screen(LogWindow())

    # -- runs and requests --

    def show_run(self, index: int) -> None:
        self._current = index % len(self._live)
        self.draw()

    def action_next_run(self) -> None:
        self.show_run(self._current + 1)

    def action_previous_run(self) -> None:
        self.show_run(self._current - 1)

    def action_save_now(self) -> None:
        self._request("save")

    def action_stop_run(self) -> None:
        question = f"Stop {self.scene.run.name} at the next step boundary?"
        self.push_screen(ConfirmWindow(question, lambda: self._request("stop")))

    def _request(self, action: str) -> None:
        run = self.scene.run
        if run.status is not RunStatus.RUNNING:
            self.notify(
                f"the run is {run.status}: nobody would hear the request", severity="warning", timeout=3
            )
            return
        try:
            post_request(run.path, action, by="watch")
        except RunError as error:
            self.notify(str(error), severity="error")
            return
        self.notify(f"asked the run to {action} at the next step boundary", timeout=3)

    # -- fixes --

    def mend(self, remedy: Remedy, path: str) -> None:
        """Apply a fix to the run at `path`, one at a time. Raises RunError when it cannot be begun."""
        if self.mending is not None and not self.mending.settled:
            self.notify("another fix is under way", severity="warning", timeout=3)
            return
        run = next(run for run in self.live_runs if run.path == path)
        self.command = command(remedy, run)
        self.mending = begin(remedy, run, self.add_run)
        self._follow_mending()

    def heard(self) -> None:
        self._follow_mending()

    def _follow_mending(self) -> None:
        current = self.mending
        if current is None or current.settled:
            return
        current.look(next(run for run in self.live_runs if run.path == current.path))
        if current.settled:
            good = current.state == GOOD
            # What is done need not be typed any more.
            self.command = None if good else self.command
            self.notify(current.text, severity="information" if good else "error", timeout=8)
