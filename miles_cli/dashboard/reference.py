"""docs/reference/keys.md from the table of actions: `python -m miles_cli.dashboard.reference DIRECTORY`."""

from __future__ import annotations

import sys
from pathlib import Path

from miles_cli.dashboard.actions import SCOPES, key_rows

PAGE = "keys.md"


def keys_page() -> str:
    """The page as Markdown."""
    lines = [
        "# Keys of `miles watch`",
        "",
        "Generated from `miles_cli/dashboard/actions.py` by `make docs`; do not edit.",
    ]
    for scope, heading in SCOPES.items():
        lines += ["", f"## {heading}", "", "| Key | Action | What it does |", "|---|---|---|"]
        for keys, title, tooltip in key_rows(scope):
            shown = " ".join(key if key == "to" else f"`{key}`" for key in keys.split(" "))
            lines.append(f"| {shown} | {title} | {tooltip} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/reference")
    (directory / PAGE).write_text(keys_page())


if __name__ == "__main__":
    main()
