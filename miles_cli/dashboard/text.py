"""Styled lines as Rich renderables, for the windows that scroll and wrap."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from miles_cli.dashboard.canvas import Line
from miles_cli.dashboard.styles import ink_of


def rich_text(lines: Iterable[Line]) -> Text:
    """The lines as they are."""
    return Text("\n").join(_text(line) for line in lines)


def hanging(lines: Iterable[Line], lead: int) -> RenderableType:
    """Lines whose rest wraps beside their first `lead` parts, not below them."""
    return Group(*(_row(line, lead) if len(line) > lead else _text(line) for line in lines))


def _row(line: Line, lead: int) -> Table:
    row = Table.grid()
    for text, _ in line[:lead]:
        row.add_column(width=len(text), no_wrap=True)
    row.add_column()
    row.add_row(*(_text([part]) for part in line[:lead]), _text(line[lead:]))
    return row


def _text(line: Line) -> Text:
    text = Text()
    for part, style in line:
        text.append(part, ink_of(style))
    return text
