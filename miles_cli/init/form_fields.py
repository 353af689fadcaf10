"""The rows of the form: a mark, a title, and a field that is typed into or turned through its choices."""

from __future__ import annotations

from collections.abc import Iterable

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget
from textual.widgets import Input, Static

from miles_cli.init.answers import as_text
from miles_cli.init.questions import Question, Value

TURNED = frozenset({"profile", "input_key", "label_key", "rm_type", "apply_chat_template"})
"""Questions with few answers."""

NONE = "(none)"
MARKS = {"suggested": " ", "given": "*", "missing": "!", "wrong": "x"}
"""The state of an answer, without colour."""


class FieldChanged(Message):
    """The user changed an answer; `text` is what it is now."""

    def __init__(self, row: Row, text: str) -> None:
        super().__init__()
        self.row, self.text = row, text


class Turner(Widget, can_focus=True):
    """A field that shows one of its choices: left and right turn it, a letter jumps."""

    BINDINGS = [  # noqa: RUF012
        Binding("left", "turn(-1)", show=False),
        Binding("right,space,enter", "turn(1)", show=False),
    ]
    value = reactive("")

    class Turned(Message):
        """Another choice was taken."""

    def __init__(self) -> None:
        super().__init__()
        self.choices: tuple[str, ...] = ()

    def render(self) -> Text:
        shown = self.value or (NONE if "" in self.choices else "")
        return Text(f"< {shown} >" if len(self.choices) > 1 else shown)

    def action_turn(self, by: int) -> None:
        if not self.choices:
            return
        at = self.choices.index(self.value) if self.value in self.choices else (-1 if by > 0 else 0)
        self._take(self.choices[(at + by) % len(self.choices)])

    def on_key(self, event: events.Key) -> None:
        letter = event.character or ""
        fitting = [choice for choice in self.choices if letter.isalnum() and choice.startswith(letter)]
        if fitting:
            event.stop()
            later = [c for c in fitting if self.choices.index(c) > self._at()]
            self._take((later or fitting)[0])

    def on_click(self) -> None:
        self.action_turn(1)

    def _at(self) -> int:
        return self.choices.index(self.value) if self.value in self.choices else -1

    def _take(self, choice: str) -> None:
        self.value = choice
        self.post_message(self.Turned())


class Row(Horizontal):
    """One question of the form."""

    def __init__(self, question: Question) -> None:
        super().__init__(id=f"row-{question.id}", classes="row")
        self.question = question
        self.state = "suggested"
        self.problem = ""
        self.why = ""
        self._mark = Static(" ", classes="mark")
        turned = question.id in TURNED
        self.field: Turner | Input = Turner() if turned else Input(compact=True, select_on_focus=False)

    def compose(self) -> ComposeResult:
        yield self._mark
        yield Static(self.question.title, classes="title")
        yield self.field

    @property
    def text(self) -> str:
        """What the field holds."""
        return self.field.value

    def offer(self, choices: Iterable[str]) -> None:
        """The choices of a field that is turned; an optional one can be turned to nothing."""
        if isinstance(self.field, Turner):
            if self.question.id == "apply_chat_template":
                choices = ("yes", "no")
            found = tuple(choices)
            self.field.choices = ("", *found) if self.question.optional and found else found
            self.field.refresh()

    def show(self, state: str, value: Value | None, why: str) -> None:
        """Show an answer. A text that the user is typing is left alone."""
        self.why, self.problem = why, ""
        self._set_state(state)
        typing = isinstance(self.field, Input) and self.field.has_focus and state != "suggested"
        if not typing:
            self.reset_to(value)

    def reset_to(self, value: Value | None) -> None:
        """Put a value into the field without a message about it."""
        text = "" if value is None else as_text(value)
        if self.field.value != text:
            with self.prevent(Input.Changed):
                self.field.value = text

    def show_wrong(self, problem: str) -> None:
        """Say that what was typed is no answer."""
        self.problem = problem
        self._set_state("wrong")

    def _set_state(self, state: str) -> None:
        self.state = state
        self._mark.update(MARKS[state], layout=False)
        self.set_class(state == "given", "given")
        self.set_class(state in ("missing", "wrong"), "open")

    def on_input_changed(self, event: Input.Changed) -> None:
        event.stop()
        self.post_message(FieldChanged(self, event.value))

    def on_turner_turned(self, event: Turner.Turned) -> None:
        event.stop()
        self.post_message(FieldChanged(self, self.field.value))
