"""Write every generated page of `docs/reference/`: `python -m miles_cli.docs`."""

from __future__ import annotations

import runpy
import sys

GENERATORS = (
    "miles_cli.family_table",
    "miles.config.reference",
    "miles.record.reference",
    "miles.diagnosis.reference",
    "miles.planning.reference",
    "miles.planning.scale_page",
    "miles_cli.dashboard.reference",
    "miles_cli.memory_reference",
)
OUTPUT = "docs/reference"


def main() -> None:
    """Run the generators one after another, from the root of the repository."""
    for module in GENERATORS:
        sys.argv = [module, OUTPUT]
        runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    main()
