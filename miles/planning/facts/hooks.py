"""Functions of the user's that a run file names: whether their files define them. Nothing of them is run."""

from __future__ import annotations

import difflib
import symtable
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from miles.config import RunConfig
from miles.config.relations import HOOKS


@dataclass(frozen=True)
class BrokenHook:
    """A setting that names a function which its file does not define."""

    setting: str
    what: str
    fix: str = ""


def hook_files(config: RunConfig) -> Iterator[tuple[str, str, str]]:
    """Setting, file and function of every hook that is named by its file."""
    for setting in HOOKS:
        section, _, name = setting.partition(".")
        hook = getattr(getattr(config, section), name)
        if hook is not None and ".py:" in hook:
            place, _, function = hook.rpartition(":")
            yield setting, place, function


def broken_hooks(config: RunConfig) -> tuple[BrokenHook, ...]:
    """Every hook whose file does not parse or binds no such name; files that are not there are left out."""
    found = (_look(*hook) for hook in hook_files(config))
    return tuple(broken for broken in found if broken is not None)


def _look(setting: str, place: str, function: str) -> BrokenHook | None:
    try:
        text = Path(place).expanduser().read_text(encoding="utf-8")
        symbols = symtable.symtable(text, place, "exec").get_symbols()
    except OSError:
        return None
    except SyntaxError as error:
        return BrokenHook(setting, f"{place}:{error.lineno} does not parse: {error.msg}")
    except ValueError as error:
        return BrokenHook(setting, f"{place} is no text of Python: {error}")
    names = [symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()]
    # What a star brings along, and what a module makes up when asked, is unknown before it runs.
    if function in names or "__getattr__" in names or "import *" in text:
        return None
    near = difflib.get_close_matches(function, names, n=1)
    return BrokenHook(
        setting,
        f"{place} has no {function!r}; it has {', '.join(names) or 'nothing'}",
        f"name it: {place}:{near[0]}" if near else "",
    )
