"""Windows over the board: their frame, and the plain ones (keys, explanation, question)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from miles_cli.dashboard.actions import CONFIRM, LIST, SCOPES, actions_of, key_rows
from miles_cli.dashboard.canvas import Line
from miles_cli.dashboard.text import hanging, rich_text

if TYPE_CHECKING:
    from miles_cli.dashboard.watch_app import WatchApp


_BEFORE_FOCUS = frozenset({"tab", "shift+tab"})
"""Keys that a Textual screen would take for its own widgets."""


def bindings(*scopes: str) -> list[BindingType]:
    """Textual bindings of every action in these scopes."""
    return [
        Binding(key, action.handler, action.title, tooltip=action.tooltip, priority=key in _BEFORE_FOCUS)
        for action in actions_of(*scopes)
        for key in action.keys
    ]


class Window(ModalScreen[None]):
    """A framed box over the board with a title, and a row of its keys at the bottom."""

    SCOPE = LIST
    HEADING = ""
    DEFAULT_CSS = """
    Window { align: center middle; }
    Window > #window {
        width: 92%; max-width: 130; height: 88%; background: #141a23; color: #d7dce4;
        border: round #5fd4e6; border-title-color: #ffffff; border-title-style: bold;
        border-subtitle-color: #7d8799; padding: 0 1;
    }
    Window.ascii > #window { border: ascii #5fd4e6; }
    Window Static { width: 1fr; height: auto; }
    Window OptionList, Window OptionList:focus { background: #141a23; border: none; padding: 0; }
    Window OptionList > .option-list--option-highlighted,
    Window OptionList:focus > .option-list--option-highlighted { background: #24435c; }
    Window OptionList > .option-list--option-hover { background: #1d2f40; }
    Window Input { height: 1; border: none; background: #1d2531; padding: 0 1; }
    Window * { scrollbar-size-vertical: 1; scrollbar-color: #3a5a70; scrollbar-background: #141a23; }
    Window.ascii * { scrollbar-size: 0 0; }
    Window .hidden { display: none; }
    """

    @property
    def watch_app(self) -> WatchApp:
        return cast("WatchApp", self.app)

    def compose(self) -> ComposeResult:
        self.set_class(self.watch_app.symbols.name == "ascii", "ascii")
        box = Vertical(id="window")
        box.border_title = self.HEADING
        box.border_subtitle = self._keys()
        with box:
            yield from self.body()

    def body(self) -> ComposeResult:
        """The widgets inside the frame."""
        raise NotImplementedError

    def _keys(self) -> str:
        entries = [(a.shown_keys.split()[0], a.footer) for a in actions_of(self.SCOPE) if a.footer]
        return "  ".join(f"{key} {word}" for key, word in [*entries, ("esc", "close")])

    def action_dismiss(self, result: None = None) -> None:  # type: ignore[override]
        self.dismiss(None)


class TextWindow(Window):
    """Lines to read."""

    BINDINGS = bindings(LIST)

    def __init__(self, heading: str, lines: Sequence[Line], lead: int) -> None:
        """The first `lead` parts of a line stay in front when the rest of it wraps."""
        super().__init__()
        self.HEADING, self._text = heading, hanging(lines, lead)

    def body(self) -> ComposeResult:
        with VerticalScroll():
            yield Static(self._text)


def keys_lines(*scopes: str) -> list[Line]:
    """The help screen: every key with its action and what it does."""
    lines: list[Line] = []
    for scope in scopes:
        lines += [[], [(SCOPES[scope], "title")]] if lines else [[(SCOPES[scope], "title")]]
        for keys, title, tooltip in key_rows(scope):
            lines.append([(f"  {keys:<20}", "key"), (f"{title:<18}", "strong"), (tooltip, "axis")])
    return lines


class ConfirmWindow(Window):
    """A question that enter answers with yes; anything else closes it."""

    HEADING = "sure?"
    BINDINGS = bindings(LIST, CONFIRM)
    DEFAULT_CSS = "ConfirmWindow > #window { width: 70; height: 7; }"

    def __init__(self, question: str, on_yes: Callable[[], None]) -> None:
        super().__init__()
        self._question, self._on_yes = question, on_yes

    def body(self) -> ComposeResult:
        yield Static(
            rich_text(
                [
                    [],
                    [(self._question, "strong")],
                    [],
                    [("enter", "key"), (" yes   ", "axis"), ("esc", "key"), (" no", "axis")],
                ]
            )
        )

    def action_yes(self) -> None:
        self.dismiss(None)
        self._on_yes()
