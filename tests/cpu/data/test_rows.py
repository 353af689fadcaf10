"""Prompt files: found, sliced, indexed; broken lines keep their numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from miles.data.rows import BadJson, DataPath, iterate, open_rows, parse_data_path
from miles.errors import DataError


def test_paths_and_slices() -> None:
    assert parse_data_path("a/b.jsonl") == DataPath(Path("a/b.jsonl"))
    assert parse_data_path("b.jsonl@[2:5]") == DataPath(Path("b.jsonl"), 2, 5)
    assert parse_data_path("b.jsonl@[:5]") == DataPath(Path("b.jsonl"), None, 5)
    assert parse_data_path("b.jsonl@[-3:]") == DataPath(Path("b.jsonl"), -3, None)
    assert list(parse_data_path("b.jsonl@[-3:]").indices(10)) == [7, 8, 9]
    assert str(parse_data_path("b.jsonl@[:5]")) == "b.jsonl@[:5]"
    for broken in ("b.jsonl@[5]", "b.jsonl@[a:b]", "b.jsonl@[1:2", "b.jsonl@[1:2:3]"):
        with pytest.raises(DataError, match="cannot read the slice"):
            parse_data_path(broken)


def test_a_built_in_name_takes_a_slice_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILES_CACHE_DIR", str(tmp_path))
    path = parse_data_path("builtin:sort/test@[:3]")
    assert path.path.is_file()
    assert parse_data_path("builtin:sort@0/test@[:3]") == path
    assert len(path.indices(512)) == 3


def test_lines_are_numbered_as_an_editor_numbers_them(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\n{"a": 1}\r\n  \n{"a": \n[1]\n{"a": "\xff"}\n{"a": 2}')
    rows = open_rows(path)
    assert [rows.line(i) for i in range(len(rows))] == [2, 4, 5, 6, 7]
    assert rows.read(4) == {"a": 2}
    found = dict(iterate(rows, range(5)))
    assert found[0] == {"a": 1}
    assert [str(found[i]) for i in (1, 2, 3)] == [
        "not JSON at column 7: Expecting value",
        "not a JSON object (a prompt file holds one object per line)",
        "not UTF-8: byte 0xff at column 8",
    ]
    assert isinstance(found[1], BadJson)


def test_rows_are_read_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"i": i, "pad": "ä" * i}) + "\n" for i in range(50)))
    rows = open_rows(path)
    assert [rows.read(i)["i"] for i in (49, 0, 17, 17)] == [49, 0, 17, 17]


def test_parquet_rows_keep_their_nesting(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    wanted = [{"input": [{"role": "user", "content": f"q{i}"}], "label": i} for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(wanted), path)
    rows = open_rows(path)
    assert [rows.read(i) for i in range(len(rows))] == wanted
    assert rows.line(0) == 1


def test_a_file_that_cannot_serve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such prompt file"):
        open_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="directory"):
        open_rows(tmp_path)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(DataError, match="empty"):
        open_rows(empty)
    other = tmp_path / "data.csv"
    other.write_text("a,b\n")
    with pytest.raises(DataError, match=r"unknown kind '\.csv'"):
        open_rows(other)
    truncated = tmp_path / "t.parquet"
    truncated.write_bytes(b"PAR1 nothing else")
    with pytest.raises(DataError, match="not a readable Parquet"):
        open_rows(truncated)
