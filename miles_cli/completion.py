"""Shell completion of the settings that `miles train` passes on: their flags, and the values of a choice."""

from __future__ import annotations

from collections.abc import Iterator

from typer._click import Context
from typer._click.shell_completion import CompletionItem
from typer.core import TyperCommand


class SettingsCommand(TyperCommand):
    """A command that takes every setting of a run file as a flag, beside its own options."""

    def shell_complete(self, ctx: Context, incomplete: str) -> list[CompletionItem]:
        """The values of the flag before the cursor if it has a choice; else flags."""
        items = super().shell_complete(ctx, incomplete)
        values = _choices(ctx.args[-1]) if ctx.args else ()
        if values and not incomplete.startswith("-"):
            return [CompletionItem(value) for value in values if value.startswith(incomplete)]
        known = {item.value for item in items}
        return items + [item for item in _flags(incomplete) if item.value not in known]


def _choices(flag: str) -> tuple[str, ...]:
    from miles.config import find_flag

    found = find_flag(flag)
    return found[0].choices if found else ()


def _flags(incomplete: str) -> Iterator[CompletionItem]:
    """Flags that begin so; nothing before the first dash, where a file's name may come."""
    from miles.config import fields

    if not incomplete.startswith("-"):
        return
    for field in fields():
        if field.flag.startswith(incomplete):
            yield CompletionItem(field.flag, help=f"{field.section}: {field.type}")
