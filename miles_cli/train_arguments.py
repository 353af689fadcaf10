"""The options of `miles train` that are no settings of a run file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def _complete_profile(incomplete: str) -> list[str]:
    from miles.config.shipped import shipped_names

    return [name for name in shipped_names() if name.startswith(incomplete)]


Profile = Annotated[
    str | None, typer.Option(help="A shipped profile, or ./my.toml.", autocompletion=_complete_profile)
]
RunFile = Annotated[Path | None, typer.Option(help="A run file of your own (TOML).")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="section.name=value, as in the run file; repeatable.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan; start nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No line per step; alerts and the end only.")]
AssumeHardware = Annotated[
    str | None,
    typer.Option(
        "--assume-hardware", help="With --dry-run: plan for 16xH100, 2x8xB200, … and not for this machine."
    ),
]
Rehearse = Annotated[
    bool,
    typer.Option(
        "--rehearse", help="Three steps of a run on GPUs here, on CPUs, with a small model of its family."
    ),
]
Explain = Annotated[str | None, typer.Option("--explain", metavar="RULE", help="Explain a preflight rule.")]
Watch = Annotated[
    bool, typer.Option("--watch", help="Train in a process of its own and open the dashboard on it.")
]
Parent = Annotated[
    str | None,
    typer.Option("--parent", help="Start from the settings of this run; kept in the new one's record."),
]
ListFlags = Annotated[
    bool, typer.Option("--list-flags", help="List every setting with its flag and meaning.")
]
