"""Tasks that miles makes itself from a seed: prompts, labels, demonstrations, tokenizer, model config.

A built-in name is `builtin:<task>` (the checkpoint directory: tokenizer and config.json) or
`builtin:<task>/<train|test|demonstrations>` (a JSONL file). `builtin:<task>@<seed>` is the same task with
other data and another warm start; without it the seed is 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from miles import environment
from miles.data.tasks import sort
from miles.data.tasks.assets import TaskAssets
from miles.errors import DataError

PREFIX = "builtin:"
DEFAULT_SEED = 0
_TASKS: dict[str, ModuleType] = {"sort": sort}

__all__ = [
    "DEFAULT_SEED",
    "PREFIX",
    "BuiltinName",
    "TaskAssets",
    "assets",
    "is_builtin",
    "parse_builtin",
    "resolve_builtin",
]


def is_builtin(name: str | None) -> bool:
    """Whether a path-like value names a built-in asset."""
    return name is not None and name.startswith(PREFIX)


@dataclass(frozen=True)
class BuiltinName:
    """A built-in name, taken apart. `part` is empty for the checkpoint."""

    task: str
    seed: int
    part: str


def parse_builtin(name: str) -> BuiltinName:
    """Take a built-in name apart; the slice suffix `@[a:b]` is not part of it.

    Raises DataError for a name of another form.
    """
    match = re.fullmatch(rf"{PREFIX}(\w+)(?:@(\d+))?(?:/(\w+))?", name)
    if match is None:
        raise DataError(f"{name!r} is no built-in name", fix=f"write {PREFIX}sort, or {PREFIX}sort@1/train")
    return BuiltinName(match[1], int(match[2] or DEFAULT_SEED), match[3] or "")


def assets(name: str, seed: int = DEFAULT_SEED, cache_dir: Path | None = None) -> TaskAssets:
    """The files of a built-in task, made on first use under `cache_dir` (default: the cache of miles).

    Raises DataError for an unknown task and for cached files that were changed.
    """
    if name not in _TASKS:
        raise DataError(
            f"no built-in task is called {name!r}",
            why=f"there is: {', '.join(_TASKS)}",
            fix=f"write {PREFIX}{next(iter(_TASKS))}, or a path",
        )
    root = (cache_dir or environment.cache_dir()) / "tasks"
    task = _TASKS[name]
    made: TaskAssets = task.build_assets(root / f"{name}-v{task.RECIPE_VERSION}-seed{seed}", seed)
    return made


def resolve_builtin(name: str, cache_dir: Path | None = None) -> Path:
    """The file or directory behind a built-in name, e.g. `builtin:sort/train`; made on first use."""
    parsed = parse_builtin(name)
    made = assets(parsed.task, parsed.seed, cache_dir)
    parts = {
        "": made.checkpoint,
        "train": made.train,
        "test": made.test,
        "demonstrations": made.demonstrations,
    }
    if parsed.part not in parts:
        raise DataError(
            f"the built-in task {parsed.task} has no part {parsed.part!r}",
            why=f"it has: {', '.join(p for p in parts if p)}",
            fix=f"write {PREFIX}{parsed.task}/train",
        )
    return parts[parsed.part]
