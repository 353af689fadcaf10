"""User functions named in the configuration: found by name or file, blamed by file and line.

A hook is `module:function`, `module.function` or `path/to/file.py:function`.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import linecache
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from miles.errors import MilesError

Hook = Callable[..., Any]


class HookError(MilesError):
    """A user function cannot be loaded, or raised, or returned what it must not."""


def load_hook(spec: str, flag: str) -> Hook:
    """The function (or class) behind `spec`; `flag` is the flag it was given with, for messages.

    Raises HookError when the file, the module or the function is not there, and when importing it fails.
    """
    location, name = _split(spec, flag)
    if location.endswith(".py"):
        module = _load_file(Path(location).expanduser(), flag)
    else:
        module = _import(location, spec, flag)
    hook = getattr(module, name, None)
    if hook is None:
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        near = difflib.get_close_matches(name, names, n=1)
        raise HookError(
            f"{location} has no {name!r}",
            where=flag,
            why=f"it has {', '.join(names) or 'no functions'}",
            fix=f"{flag} {location}:{near[0] if near else 'FUNCTION'}",
        )
    if not callable(hook):
        raise HookError(f"{name!r} is no function but {type(hook).__name__}", where=f"{flag} {spec}")
    return hook


async def call_hook(hook: Hook, *args: Any) -> Any:
    """Call a sync or async hook. Whatever it raises becomes a HookError with the user's file and line."""
    try:
        result = hook(*args)
        return await result if inspect.isawaitable(result) else result
    except Exception as error:  # User code may raise anything, and all of it is theirs to see.
        raise blame(error, hook) from error


def call_sync(hook: Hook, *args: Any, **named: Any) -> Any:
    """`call_hook` of a hook that is not async."""
    try:
        return hook(*args, **named)
    except Exception as error:  # User code may raise anything, and all of it is theirs to see.
        raise blame(error, hook) from error


def hook_name(hook: Hook) -> str:
    """What a person calls the hook."""
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


def hook_place(hook: Hook) -> str:
    """`file:line` of the hook's definition, or its name where it has no source."""
    code = getattr(inspect.unwrap(hook), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else hook_name(hook)


def blame(error: Exception, hook: Hook) -> HookError:
    """The HookError for an exception that left `hook`: the deepest line in the hook's own file.

    An exception that never entered it is about how it is called: the place is then its definition.
    """
    code = getattr(inspect.unwrap(hook), "__code__", None)
    own_file = code.co_filename if code else None
    what = f"the user function {hook_name(hook)} failed"
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, TypeError) and own_file is not None and frames[-1].filename == __file__:
        return HookError(what, where=hook_place(hook), why=f"it cannot be called so: {error}")
    return _blame(error, what, own_file)


def _blame(error: Exception, what: str, own_file: str | None) -> HookError:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == own_file]
    frame = (own or frames)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return HookError(
        what,
        where=f"{frame.filename}:{frame.lineno}, in {frame.name}",
        why=f"{type(error).__name__}: {error}" + (f" at `{line}`" if line else ""),
    )


def _split(spec: str, flag: str) -> tuple[str, str]:
    location, colon, name = spec.rpartition(":")
    if not colon:
        location, _, name = spec.rpartition(".")
    if not location or not name.isidentifier() or (not colon and name == "py"):
        raise HookError(
            f"cannot read {spec!r} as a function",
            where=flag,
            fix=f"{flag} module:function, or {flag} path/to/file.py:function",
        )
    return location, name


def _load_file(path: Path, flag: str) -> ModuleType:
    if not path.is_file():
        raise HookError("no such file", where=f"{flag} {path}", why=f"looked in {Path.cwd()}")
    path = path.resolve()
    name = f"miles_hook_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Before execution: dataclasses and pickling look a class's module up here.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # The user's module runs here, and it may raise anything.
        del sys.modules[name]
        raise _failed_import(error, str(path)) from error
    return module


def _import(name: str, spec: str, flag: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise _failed_import(error, None) from error
        raise HookError(
            f"no module named {error.name!r}",
            where=f"{flag} {spec}",
            why="it is not on Python's path",
            fix=f"{flag} path/to/file.py:function, or put its folder on PYTHONPATH",
        ) from error
    except Exception as error:  # The user's module runs here, and it may raise anything.
        raise _failed_import(error, None) from error


def _failed_import(error: Exception, file: str | None) -> HookError:
    if isinstance(error, SyntaxError):
        return HookError(
            "the user module does not parse", where=f"{error.filename}:{error.lineno}", why=str(error.msg)
        )
    return _blame(error, "importing the user module failed", file)
