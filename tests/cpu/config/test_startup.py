"""Resolving a profile is quick and loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
import time

HEAVY = ("torch", "ray", "numpy", "transformers", "textual", "rich", "tokenizers", "pyarrow")


def test_resolution_loads_no_heavy_library() -> None:
    code = (
        "import sys; from miles.config import dump_toml, parse_flags, resolve; "
        "dump_toml(resolve('quickstart', flags=parse_flags(['--lr', '1e-3']))); "
        f"sys.exit(', '.join(sorted(set({HEAVY!r}) & set(sys.modules))) or 0)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_resolution_after_import_takes_milliseconds() -> None:
    from miles.config import resolve

    resolve("quickstart")
    start = time.process_time()
    resolve("quickstart")
    assert time.process_time() - start < 0.1
