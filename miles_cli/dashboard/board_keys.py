"""What the keys of the board do to the view: panels, place in time, filter."""

from __future__ import annotations

from textual.widgets import Input

from miles_cli.dashboard.board_app import BoardApp
from miles_cli.dashboard.stage import Stage
from miles_cli.dashboard.view import FULL, MODES, NORMAL


class BoardKeys(BoardApp):
    """The board with its actions; every one changes the view and draws it again."""

    # -- panels --

    def action_toggle_panel(self, number: str) -> None:
        self.view = self.view.toggle(int(number), self.scene.run, self.capacity)
        self.draw()

    def action_next_preset(self) -> None:
        self.view = self.view.next_preset(self.scene.run)
        self.draw()

    def show_preset(self, name: str) -> None:
        self.look(preset=name, focus=0, query="", pinned=(), page=0, mode=NORMAL)

    def pin(self, metric: str) -> None:
        """Show one metric on the whole board."""
        self.look(pinned=(metric,), focus=0, page=0, mode=FULL)

    def _move_focus(self, by: int) -> None:
        count = len(self.view.shown(self.scene.run, self.capacity))
        self.look(focus=(min(self.view.focus, max(0, count - 1)) + by) % max(1, count))

    def action_focus_next_panel(self) -> None:
        self._move_focus(1)

    def action_focus_previous_panel(self) -> None:
        self._move_focus(-1)

    def action_zoom(self) -> None:
        self.look(mode=NORMAL if self.view.mode == FULL else FULL)

    def action_larger(self) -> None:
        self.look(mode=MODES[min(len(MODES) - 1, MODES.index(self.view.mode) + 1)])

    def action_smaller(self) -> None:
        self.look(mode=MODES[max(0, MODES.index(self.view.mode) - 1)])

    def action_page_down(self) -> None:
        pages = -(-len(self.view.candidates(self.scene.run)) // self.capacity)
        self.look(page=min(max(0, pages - 1), self.view.page + 1), focus=0)

    def action_page_up(self) -> None:
        self.look(page=max(0, self.view.page - 1), focus=0)

    def action_toggle_log(self) -> None:
        self.look(log=not self.view.log)

    def action_toggle_average(self) -> None:
        self.look(averaged=not self.view.averaged)

    def action_toggle_shared(self) -> None:
        self.look(shared=not self.view.shared)

    def action_next_window(self) -> None:
        self.view = self.view.next_window()
        self.draw()

    # -- place in time --

    def action_freeze(self) -> None:
        self._frozen = self._live if self._frozen is None else None
        if self._frozen is None:
            self.view = self.view.with_(cursor=None)
        self.draw()

    def action_live(self) -> None:
        self._frozen = None
        self.look(cursor=None)

    def inspect(self, step: int) -> None:
        """Hold the view and show the values of `step`."""
        self._frozen = self._frozen or self._live
        run = self.scene.run
        self.look(cursor=min(max(step, run.first_step), run.last_step))

    def _scrub(self, by: int) -> None:
        run = self.scene.run
        self.inspect((run.last_step if self.view.cursor is None else self.view.cursor) + by)

    def action_scrub_back(self) -> None:
        self._scrub(-1)

    def action_scrub_forward(self) -> None:
        self._scrub(1)

    def action_first_step(self) -> None:
        self.inspect(self.scene.run.first_step)

    def action_alert_back(self) -> None:
        run = self.scene.run
        at = run.last_step + 1 if self.view.cursor is None else self.view.cursor
        before = [a.step for a in run.alerts if a.step is not None and a.step < at]
        if before:
            self.inspect(max(before))

    def action_alert_forward(self) -> None:
        at = self.view.cursor
        after = [
            a.step for a in self.scene.run.alerts if a.step is not None and at is not None and a.step > at
        ]
        if after:
            self.inspect(min(after))

    # -- filter --

    def action_filter(self) -> None:
        query = self.query_one("#query", Input)
        query.add_class("open")
        query.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        if event.input.id == "query":
            self.look(query=event.value.strip(), page=0, focus=0, mode=NORMAL, pinned=())

    def on_input_submitted(self, event: Input.Submitted) -> None:
        if event.input.id == "query":
            self._close_filter()

    def _close_filter(self) -> None:
        self.query_one("#query", Input).remove_class("open")
        self.query_one(Stage).focus()

    def action_step_out(self) -> None:
        """One level back: typing, zoom, filter, inspected step; in that order, never stuck."""
        query = self.query_one("#query", Input)
        if query.has_class("open") or self.view.query:
            query.value = ""
            self._close_filter()
            self.look(query="")
        elif self.view.pinned:
            self.look(pinned=(), mode=NORMAL, focus=0)
        elif self.view.mode != NORMAL:
            self.look(mode=NORMAL)
        else:
            self.action_live()
