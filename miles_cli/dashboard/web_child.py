"""The process behind one browser tab: the dashboard on pipes. Only the web server starts it."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from pathlib import Path

from miles_cli.dashboard.symbols import LADDER
from miles_cli.dashboard.watch_app import WatchApp

ORPHAN_CHECK = 2.0
"""Seconds between looks at the parent; a server that is killed does not take its children along."""


class ServedApp(WatchApp):
    """The dashboard that leaves when its server is gone."""

    def on_mount(self) -> None:
        parent = os.getppid()
        self.set_interval(ORPHAN_CHECK, lambda: self.exit() if os.getppid() != parent else None)


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("run_dirs", nargs="+", type=Path)
    parser.add_argument("--symbols", choices=sorted(LADDER), default="braille")
    options = parser.parse_args()
    ServedApp(options.run_dirs, LADDER[options.symbols]).run()


if __name__ == "__main__":
    main()
