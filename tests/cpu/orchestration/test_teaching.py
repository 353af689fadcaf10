"""A teacher has to know the student's tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles.errors import ConfigError
from miles.orchestration.teaching import _require_one_vocabulary


def checkpoint(path: Path, vocab: dict[str, int] | None) -> Path:
    path.mkdir()
    if vocab is not None:
        (path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab}}))
    return path


@pytest.mark.parametrize(
    ("vocab", "size", "fits"),
    [({"a": 0}, 8, True), ({"b": 0}, 4, False), (None, 4, True), (None, 8, False)],
)
def test_vocabularies_are_compared_by_tokens_then_by_size(vocab, size, fits, tmp_path: Path) -> None:
    student, teacher = checkpoint(tmp_path / "student", {"a": 0}), checkpoint(tmp_path / "teacher", vocab)
    if fits:
        _require_one_vocabulary(teacher, size, student, 4)
        return
    with pytest.raises(ConfigError, match="cannot read the student's tokens"):
        _require_one_vocabulary(teacher, size, student, 4)
