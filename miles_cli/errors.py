"""How an error leaves the program: one message on stderr, and one JSON object on stdout under `--json`."""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from miles.errors import ConfigError, MilesError

_log_dirs: list[Path] = []


def keep_tracebacks_in(log_dir: Path) -> None:
    """From now on a defect's traceback goes into this directory (a run's logs), not a temporary file."""
    _log_dirs.append(log_dir)


def report(error: MilesError, as_json: bool = False) -> int:
    """Print a user's mistake: what, where, why, fix. Returns its exit code."""
    if as_json:
        print(json.dumps({"error": as_dict(error), "exit_code": int(error.exit_code)}))
    print(f"error: {error}", file=sys.stderr)
    return int(error.exit_code)


def as_dict(error: MilesError) -> dict[str, Any]:
    """The error as JSON-able values; a configuration error lists every problem, a refusal every finding."""
    if isinstance(error, ConfigError):
        return {"kind": "ConfigError", "problems": [as_dict(problem) for problem in error.problems]}
    payload: dict[str, Any] = {"kind": type(error).__name__, "what": error.what, "where": error.where}
    payload |= {"why": error.why, "fix": error.fix}
    findings = getattr(error, "findings", None)
    if findings is not None:
        payload["findings"] = [finding.as_dict() for finding in findings]
    outline = getattr(error, "outline", None)
    if outline is not None:
        payload["outline"] = outline.as_dict()
    return payload


def report_unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """`sys.excepthook`: a defect of ours is a short message; its traceback is kept in a file."""
    text = "".join(traceback.format_exception(kind, error, trace))
    path = _traceback_file(text)
    print(f"error: unexpected {kind.__name__}: {error}", file=sys.stderr)
    print(f"  This is a defect of miles, not of your input. The traceback is in {path}", file=sys.stderr)


def _traceback_file(text: str) -> Path:
    if _log_dirs and _log_dirs[-1].is_dir():
        path = _log_dirs[-1] / "traceback.txt"
        path.write_text(text)
        return path
    with tempfile.NamedTemporaryFile("w", prefix="miles-", suffix=".txt", delete=False) as file:
        file.write(text)
    return Path(file.name)
