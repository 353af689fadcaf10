"""`[run]`: the run as a whole."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import NonNegativeInt, PositiveInt

from miles.config.sections.base import Flag, Section


class RunSection(Section):
    """The run as a whole: its name, its seed, where it is kept, what executes it."""

    name: Annotated[str | None, Flag("--run-name")] = None
    """Name of the run directory; default: the profile's name and the time of the start."""

    seed: NonNegativeInt = 1234
    """Seed of the trainer's random streams (initialisation, dropout)."""

    runs_dir: str | None = None
    """Directory that holds run directories; default: `MILES_RUNS_DIR`, else `runs/`."""

    executor: Literal["auto", "inline", "ray"] = "auto"
    """`inline`: one process. `ray`: worker processes. `auto`: inline when one trainer and one engine fit one
    device."""

    threads: PositiveInt | None = None
    """CPU threads of each process; default: chosen by the plan, one for small models."""

    deterministic: Annotated[bool, Flag("--deterministic-mode")] = False
    """Use only deterministic kernels, at a cost in speed."""
