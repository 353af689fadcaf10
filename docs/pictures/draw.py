"""Draws the pictures of the documentation from real runs.

    python docs/pictures/draw.py HEALTHY_RUN COLLAPSED_RUN

The dashboard is opened on the run directories without a terminal, driven by keys, and its screen photographed
by headless Chromium (Debian's `chromium`; `fonts-dejavu-core` has a monospaced font with braille).
"""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from miles_cli.dashboard.feed import RunFeed
from miles_cli.dashboard.symbols import LADDER
from miles_cli.dashboard.watch_app import WatchApp

HERE = Path(__file__).parent
SIZE = (120, 40)
PICTURES = {
    "watch-overview": ("healthy", ()),
    "watch-moe": ("healthy", ("p", "p")),
    "watch-alert": ("collapsed", ("a",)),
    "watch-fix": ("collapsed", ("f",)),
}
"""Which run, and the keys that lead to the screen."""


async def screen(run: Path, keys: tuple[str, ...]) -> str:
    """The dashboard on `run` after `keys`, as SVG."""
    last = RunFeed(run).snapshot().last_time
    app = WatchApp([run], LADDER["braille"], clock=lambda: last + 2)
    async with app.run_test(size=SIZE) as pilot:
        await asyncio.sleep(1.5)
        for key in keys:
            await pilot.press(key)
            await asyncio.sleep(0.5)
        return app.export_screenshot(title=f"miles watch {run.name}")


def photograph(svg: str, picture: Path) -> None:
    """Write the SVG as a PNG, in a local font instead of the web font that Textual names."""
    svg = re.sub(r"@font-face\s*{.*?}", "", svg, flags=re.DOTALL).replace("Fira Code", "DejaVu Sans Mono")
    width, height = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0])
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("chromium is not installed")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(f'<body style="margin:0;width:{width}px">{svg}</body>', encoding="utf-8")
        quiet = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
        size = f"--window-size={int(width) + 1},{int(height) + 1}"
        subprocess.run(
            [
                *(browser, "--headless", *quiet.split(), size),
                *(f"--user-data-dir={folder}/profile", f"--screenshot={picture}", f"file://{page}"),
            ],
            check=True,
            capture_output=True,
            timeout=60,
        )


def main(healthy: str, collapsed: str) -> None:
    runs = {"healthy": Path(healthy), "collapsed": Path(collapsed)}
    for name, (run, keys) in PICTURES.items():
        photograph(asyncio.run(screen(runs[run], keys)), HERE / f"{name}.png")
        print(HERE / f"{name}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
