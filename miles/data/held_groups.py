"""Groups that wait to go on, in a file: one group per line, as JSON lists of sample records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from miles.data.sample import Sample
from miles.errors import DataError


def write_groups(path: Path, groups: Sequence[Sequence[Sample]]) -> None:
    """Write the groups; routes as `route_codec` stores them.

    Raises DataError for a sample that holds what JSON has no form for.
    """
    with path.open("w", encoding="utf-8") as file:
        for group in groups:
            file.write(_line(group) + "\n")


def _line(group: Sequence[Sample]) -> str:
    try:
        return json.dumps([sample.to_dict() for sample in group])
    except TypeError as error:
        raise DataError(
            "an unfinished sample cannot be stored in a checkpoint",
            where=f"group {group[0].group_index}",
            why=str(error),
            fix="keep numbers, texts, lists and dicts in sample.metadata",
        ) from error


def read_groups(path: Path) -> list[list[Sample]]:
    """What `write_groups` wrote; nothing where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [[Sample.from_dict(record) for record in json.loads(line)] for line in file]
