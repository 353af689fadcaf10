"""SGLang's server arguments by name, for the version that `make sglang-cpu` installs.

`make sglang-cpu` writes the table from the real server's own parser (`rollout/sglang/scripts/dump_args.py`).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from miles.config.fields import Kind

TABLE = Path(__file__).with_name("sglang_args.json")


@cache
def server_args() -> dict[str, Kind]:
    """Every argument of that SGLang version, in snake case."""
    return {name: Kind[kind.upper()] for name, kind in json.loads(TABLE.read_text())["args"].items()}


@cache
def version() -> str:
    """The SGLang version that the table was read from."""
    return str(json.loads(TABLE.read_text())["version"])
