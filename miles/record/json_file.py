"""Small files that are replaced as a whole, most of them JSON: meta, config, heartbeat, summary, requests."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import orjson

from miles.errors import RunError
from miles.record.encoding import NONFINITE, plain, restore


def replace_file(path: Path, content: bytes) -> None:
    """Replace `path` atomically: a reader sees the old file or the new one, never a part. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace `path` atomically by an object. Raises OSError."""
    nonfinite: list[tuple[str | int, ...]] = []
    body = plain(value, (), nonfinite)
    if nonfinite:
        body[NONFINITE] = nonfinite
    replace_file(path, orjson.dumps(body, default=str, option=orjson.OPT_INDENT_2) + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`. Raises RunError when the file is missing, unreadable or not a JSON object."""
    fix = "put a whole copy back, or move the file away to read the run without it"
    try:
        value = orjson.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise RunError("the file is missing", where=str(path)) from error
    except OSError as error:
        raise RunError("the file cannot be read", where=str(path), why=str(error.strerror)) from error
    except orjson.JSONDecodeError as error:
        raise RunError("the file is not valid JSON", where=str(path), why=str(error), fix=fix) from error
    if not isinstance(value, dict):
        raise RunError("the file must hold a JSON object", where=str(path), fix=fix)
    return restore(value) if NONFINITE in value else value
