"""What an attempt was told, in files that others read while the next attempt writes them anew."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from miles.config import resolve
from miles.orchestration.job import write_identity
from miles.orchestration.submission import Submission
from miles.planning import Plan
from miles.record import RunReader

PLAN = cast(Plan, SimpleNamespace(as_dict=lambda: {"trainer": "native"}))


def test_a_reader_finds_all_of_the_old_files_or_all_of_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever writes is stopped between opening a file and filling it."""
    resolved, write = resolve("quickstart"), Path.write_bytes
    write_identity(tmp_path, resolved, PLAN)
    Submission("http://head:8265", "first").keep(tmp_path)
    seen: list[tuple[int, str, str]] = []

    def slow(path: Path, content: bytes) -> int:
        path.open("wb").close()
        reader, told = RunReader(tmp_path), json.loads((tmp_path / "plan.json").read_text())
        seen.append((reader.meta["attempt"], reader.config["run"]["name"], told["trainer"]))
        return write(path, content)

    def no_other(path: Path, *content: Any, **how: Any) -> int:
        raise AssertionError(f"{path} is not replaced as a whole")

    monkeypatch.setattr(Path, "write_bytes", slow)
    monkeypatch.setattr(Path, "write_text", no_other)
    write_identity(tmp_path, resolved, PLAN, attempt=2)
    Submission("http://head:8265", "second").keep(tmp_path)
    assert [attempt for attempt, *_ in seen] == [1, 1, 1, 1, 2]
    assert RunReader(tmp_path).meta["submission"]["id"] == "second"
