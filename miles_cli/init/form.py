"""The interview as one screen: questions on the left, the run that they make on the right, live.

Every look at the world happens in one worker thread at a time; widgets change in handlers only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import typer
from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.events import DescendantFocus, Resize
from textual.screen import ModalScreen
from textual.timer import Timer
from textual.widgets import Static
from textual.worker import get_current_worker

from miles.errors import ExitCode, MilesError
from miles_cli.dashboard.styles import ink_of
from miles_cli.dashboard.symbols import Symbols, choose_symbols
from miles_cli.init.answers import parse
from miles_cli.init.form_fields import FieldChanged, Row
from miles_cli.init.form_panel import file_panel, panel
from miles_cli.init.form_style import CSS
from miles_cli.init.interview import choices
from miles_cli.init.questions import QUESTIONS, Value

if TYPE_CHECKING:
    from miles_cli.init.interview import Interview
    from miles_cli.init.preview import Preview
    from miles_cli.init.reward_trial import RewardTrial
    from miles_cli.init.session import Session

KEYS = "ctrl+s write  ctrl+t file  ctrl+r suggestion  pgdn scroll  esc leave"
ROOMY_HEIGHT = 36
"""Lines from which on groups stand apart."""

SETTLE_SECONDS = 0.2
"""Pause after a key before the run is planned anew."""


def ask_in_form(session: Session, given: Mapping[str, Value]) -> dict[str, Value]:
    """Show the form until the user writes or leaves. Leaving ends the program: 130, nothing written."""
    app = InitForm(session, given)
    answers = app.run()
    if app.return_code:
        raise MilesError("the form stopped with an error", fix="miles init --prompts asks line by line")
    if answers is None:
        raise typer.Exit(ExitCode.INTERRUPTED)
    return answers


class InitForm(App[dict[str, Value]]):
    """The form. Its result is the answers that the user gave, or None when they left."""

    CSS = CSS
    TITLE = "miles init"
    ENABLE_COMMAND_PALETTE = False
    AUTO_FOCUS = None
    BINDINGS = [  # noqa: RUF012
        Binding("ctrl+s", "write", priority=True),
        Binding("ctrl+t", "toggle_file", priority=True),
        Binding("ctrl+r", "reset", priority=True),
        Binding("escape,ctrl+q,ctrl+c", "leave", priority=True),
        Binding("down", "app.focus_next"),
        Binding("up", "app.focus_previous"),
        Binding("pagedown", "scroll(1)", priority=True),
        Binding("pageup", "scroll(-1)", priority=True),
    ]

    def __init__(self, session: Session, given: Mapping[str, Value], symbols: Symbols | None = None) -> None:
        super().__init__()
        self.session = session
        self.given: dict[str, Value] = dict(given)
        self.symbols = symbols or choose_symbols()
        self.rows = {question.id: Row(question) for question in QUESTIONS}
        self.seen: Preview | None = None
        self.trial: RewardTrial | None = None
        self.shows_file = False
        self.is_settled = False
        """Whether what is shown belongs to the answers as they are."""
        self._looking = self._stale = False
        self._writes_when_settled = False
        """Whether the user asked to write while the run was being planned."""
        self._waiting: Timer | None = None
        """Runs from the last key until the run is planned anew."""

    def compose(self) -> ComposeResult:
        yield Static(id="head")
        with Horizontal(id="body"):
            with VerticalScroll(id="questions", can_focus=False):
                group = ""
                for row in self.rows.values():
                    if row.question.group != group:
                        group = row.question.group
                        yield Static(group, classes="group")
                    yield row
            with VerticalScroll(id="panel", can_focus=False):
                yield Static("looking at this machine ...", id="seen")
        yield Static(id="help")
        yield Static(KEYS, id="keys")

    def on_mount(self) -> None:
        self.set_class(self.symbols.name == "ascii", "ascii")
        for row in self.rows.values():
            row.display = False
        self._look_again()

    def on_resize(self, event: Resize) -> None:
        self.set_class(event.size.height >= ROOMY_HEIGHT, "roomy")

    def on_field_changed(self, message: FieldChanged) -> None:
        row = message.row
        self.is_settled = self._writes_when_settled = False
        options = choices(row.question.id, self.seen.interview.scene) if self.seen else ()
        try:
            self.given[row.question.id] = parse(row.question, message.text, options)
        except MilesError as error:
            self.given.pop(row.question.id, None)
            row.show_wrong(error.what)
        else:
            row.show("given", self.given[row.question.id], row.why)
        self._show_head()
        self._show_help()
        if self._waiting is not None:
            self._waiting.stop()
        self._waiting = self.set_timer(SETTLE_SECONDS, self._look_again)

    def on_descendant_focus(self, event: DescendantFocus) -> None:
        if not self.screen_stack:
            return  # leaving: the screen is gone before the last of its messages
        current = self._focused_row()
        for row in self.rows.values():
            row.set_class(row is current, "current")
        self._show_help()

    def _look_again(self) -> None:
        """Hold the interview again, now or when the look that is under way has ended."""
        self._waiting = None
        if self._looking:
            self._stale = True
            return
        self._looking, self._stale = True, False
        self._look(dict(self.given))

    @work(thread=True)
    def _look(self, given: dict[str, Value]) -> None:
        worker = get_current_worker()
        seen = self.session.preview(self.session.hold(given))
        if not worker.is_cancelled:
            self.call_from_thread(self._show, seen, None)
            trial = self.session.trial(seen)
        if not worker.is_cancelled:
            self.call_from_thread(self._show, seen, trial)
            self.call_from_thread(self._looked)

    def _looked(self) -> None:
        self._looking = False
        if self._stale:
            self._look_again()

    def _show(self, seen: Preview, trial: RewardTrial | None) -> None:
        if not self.screen_stack:
            # The user left while this was being looked at.
            return
        first = self.seen is None
        self.seen, self.trial = seen, trial
        self.is_settled = trial is not None and not self._stale and self._waiting is None
        self._show_rows(seen.interview)
        self._show_panel()
        self._show_head()
        if first:
            self.call_after_refresh(self._focus_first)
        self._show_help()
        if self.is_settled and self._writes_when_settled:
            self.action_write()

    def _focus_first(self) -> None:
        """Begin at the first question, unless a quick user went elsewhere already."""
        if self.focused is None:
            next(row for row in self.rows.values() if row.display).field.focus()

    def _show_rows(self, interview: Interview) -> None:
        missing = {question.id for question in interview.missing}
        looked_at = interview.scene.given
        for name, row in self.rows.items():
            if self.given.get(name) != looked_at.get(name):
                # Answered anew since this look began; the next one will show it.
                continue
            answer = interview.answer(name)
            row.display = answer is not None or name in missing
            row.offer(choices(name, interview.scene))
            if row.state == "wrong" and row.field.has_focus:
                row.why = answer.why if answer else ""
            elif answer is not None:
                row.show("given" if answer.given else "suggested", answer.value, answer.why)
            else:
                row.show("missing", None, "nothing to go by; this is yours to say")
        for unused in interview.unused:
            # An answer before it was changed, and it is not asked any more.
            self.given.pop(unused.id, None)

    def _show_panel(self) -> None:
        if self.seen is not None:
            content = file_panel(self.seen) if self.shows_file else panel(self.seen, self.trial, self.symbols)
            self.query_one("#seen", Static).update(content)

    def _show_head(self) -> None:
        head = Text(f" miles init {self.session.target}  ", style=ink_of("strong"))
        text, style = self._verdict()
        head.append(text, style=ink_of(style))
        self.query_one("#head", Static).update(head, layout=False)

    def _verdict(self) -> tuple[str, str]:
        if self.seen is None or not self.is_settled:
            return "looking ...", "axis"
        wrong = [row.question.title for row in self.rows.values() if row.display and row.state == "wrong"]
        if wrong:
            return f"{self.symbols.bad} {', '.join(wrong)}: not an answer", "critical"
        if self.seen.interview.missing:
            return f"{self.symbols.critical} {len(self.seen.interview.missing)} open", "critical"
        if self._is_refused():
            return f"{self.symbols.critical} would be refused", "critical"
        warnings = len(self.seen.findings)
        if warnings:
            return f"{self.symbols.warning} ready, {warnings} warning{'s' if warnings > 1 else ''}", "warning"
        return f"{self.symbols.good} ready", "good"

    def _is_refused(self) -> bool:
        failed = self.trial is not None and self.trial.passed is False
        if self.seen is None:
            return False
        return bool(self.seen.errors or self.seen.problems or self.seen.unreachable) or failed

    def _focused_row(self) -> Row | None:
        parent = self.focused.parent if self.focused else None
        return parent if isinstance(parent, Row) else None

    def _show_help(self) -> None:
        row = self._focused_row()
        if row is None:
            return
        text = Text(f"{row.question.help} ", style=ink_of(""))
        text.append(f"{row.question.flag}\n", style=ink_of("axis"))
        text.append(row.problem or row.why, style=ink_of("critical" if row.problem else "info"))
        self.query_one("#help", Static).update(text, layout=False)

    def action_scroll(self, pages: int) -> None:
        """Scroll the right-hand side."""
        side = self.query_one("#panel", VerticalScroll)
        side.scroll_relative(y=pages * max(1, side.size.height - 2), animate=False)

    def action_toggle_file(self) -> None:
        """Show the run file in place of its plan, or the plan again."""
        self.shows_file = not self.shows_file
        self.query_one("#panel", VerticalScroll).scroll_home(animate=False)
        self._show_panel()

    def action_reset(self) -> None:
        """Take the suggestion for the focused question again."""
        row = self._focused_row()
        if row is not None:
            self.is_settled = self._writes_when_settled = False
            self.given.pop(row.question.id, None)
            row.show("suggested", None, row.why)
            self._show_head()
            self._look_again()

    def action_leave(self) -> None:
        """Leave without writing; inside a question, only that."""
        if isinstance(self.screen, WriteAnyway):
            self.screen.dismiss(False)
        else:
            self.exit(None)

    def action_write(self) -> None:
        """Write, if every question has an answer; a run that would be refused needs a second word."""
        self._writes_when_settled = not self.is_settled
        if self.seen is None or not self.is_settled:
            return
        open_rows = [row for row in self.rows.values() if row.display and row.state in ("missing", "wrong")]
        if open_rows:
            open_rows[0].field.focus()
            self.notify(f"{open_rows[0].question.title} needs an answer", severity="error")
        elif self.seen.problems:
            self.notify(str(self.seen.problems[0]), severity="error")
        elif self._is_refused():
            self.push_screen(WriteAnyway(self.seen), self._write_anyway)
        else:
            self.exit(self.given)

    def _write_anyway(self, agreed: bool | None) -> None:
        if agreed:
            self.session.write_anyway = True
            self.exit(self.given)


class WriteAnyway(ModalScreen[bool]):
    """The second word before a run file is written whose run would be refused."""

    BINDINGS = [  # noqa: RUF012
        Binding("y", "dismiss(True)"),
        Binding("n", "dismiss(False)"),
    ]

    def __init__(self, seen: Preview) -> None:
        super().__init__()
        self.seen = seen

    def compose(self) -> ComposeResult:
        errors = len(self.seen.errors)
        what = f"{errors} preflight error{'s' if errors != 1 else ''}"
        if not errors:
            unreachable = self.seen.unreachable is not None
            what = "The cluster does not answer" if unreachable else "The reward fails on two rows"
        with Vertical(id="question"):
            yield Static(f"{what}: this run would not start.", id="refusal")
            yield Static("Write the file all the same?   y yes   n no", id="choice")
