"""A fix as the change it makes to the run's config, and the command that applies it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from miles.config.toml_text import literal
from miles.diagnosis import Fix, FixKind

DEFAULT = "default"
"""What `--set key=default` calls the default."""


def diff_lines(fix: Fix, config: dict[str, Any]) -> Iterator[str]:
    """The patch as a diff of the run file, with the values that the run has now."""
    by_section = groupby(sorted(fix.patch), key=lambda change: change[0].partition(".")[0])
    for section, changes in by_section:
        yield f"  [{section}]"
        for dotted, value in changes:
            name = dotted.partition(".")[2]
            current = config.get(section, {}).get(name)
            if current is not None and current != value:
                yield f"- {name} = {literal(current)}"
            if value is not None:
                yield f"+ {name} = {literal(value)}"


def apply_command(fix: Fix, run: str) -> str | None:
    """What to type to apply the fix to `run` (path or id); None for advice that no command carries out."""
    if fix.kind is FixKind.LIVE:
        changes = "".join(f" {shlex.quote(f'{key}={_argument(value)}')}" for key, value in fix.patch)
        return f"miles runs set {shlex.quote(run)}{changes}"
    sets = "".join(f" --set {shlex.quote(f'{key}={_argument(value)}')}" for key, value in fix.patch)
    if fix.start_over:
        return f"miles train --config {shlex.quote(f'{run}/config.toml')}{sets}"
    if fix.kind is FixKind.RESUME:
        step = "" if fix.from_step is None else f" --from-step {fix.from_step}"
        return f"miles runs resume {shlex.quote(run)}{step}{sets}"
    return None


def _argument(value: Any) -> str:
    if value is None:
        return DEFAULT
    return value if isinstance(value, str) else literal(value)
