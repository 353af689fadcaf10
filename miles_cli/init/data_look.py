"""A look at a prompt file: its columns from the first rows, then lengths and bad rows under the keys."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import numpy as np

from miles.data.prompts import PromptFormat, PromptKeys
from miles.data.rows import BadJson, DataPath, iterate, open_rows, parse_data_path
from miles.data.survey import Survey, survey
from miles.data.tokenizer import CheckpointTokenizer
from miles.errors import DataError
from miles_cli.init.world import Columns, DataLook

FIRST_ROWS = 32
"""Rows from which columns are guessed."""

MEASURED_ROWS = 1000
"""Rows whose prompts are measured, so that the interview answers at once."""


def look_at_columns(path: str) -> Columns:
    """The columns of the first rows; a file that cannot be read is a problem in words, not an error."""
    try:
        data_path = parse_data_path(path)
        rows = open_rows(data_path.path)
    except DataError as error:
        return Columns(path, problem=error.in_one_line)
    selected = data_path.indices(len(rows))
    first = [row for _, row in islice(iterate(rows, selected), FIRST_ROWS) if not isinstance(row, BadJson)]
    if not first:
        return Columns(path, problem=f"{path}: none of the first rows can be read", num_rows=len(selected))
    names = tuple(dict.fromkeys(name for row in first for name in row))
    values = {name: [row[name] for row in first if row.get(name) is not None] for name in names}
    return Columns(
        path,
        num_rows=len(selected),
        names=names,
        messages=frozenset(name for name in names if values[name] and all(map(_is_chat, values[name]))),
        texts={name: tuple(map(_as_text, values[name])) for name in names},
    )


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def look_at_data(
    path: str, input_key: str, label_key: str, tokenizer: CheckpointTokenizer | None, chat_template: bool
) -> DataLook:
    """Lengths and bad rows of the first rows under these columns, in tokens where there is a tokenizer."""
    chat_template = chat_template and tokenizer is not None and bool(tokenizer.chat_templates)
    prompt_format = PromptFormat(tokenizer, chat_template) if tokenizer is not None else None
    try:
        found = survey(
            _beginning(parse_data_path(path)),
            PromptKeys(input_key, label_key or None),
            prompt_format,
            first=MEASURED_ROWS,
        )
    except DataError as error:
        return DataLook(path, problem=error.in_one_line)
    return _summed_up(path, found, tokenizer)


def _beginning(path: DataPath) -> DataPath:
    """The first rows of a slice."""
    rows = path.indices(len(open_rows(path.path)))
    return DataPath(path.path, rows.start, min(rows.stop, rows.start + MEASURED_ROWS))


def _summed_up(path: str, found: Survey, tokenizer: CheckpointTokenizer | None) -> DataLook:
    if not len(found.lengths):
        return DataLook(
            path, problem=f"no row can be used; {found.problems[0]}", bad_rows=len(found.problems)
        )
    labels = [prompt.row.label for prompt in found.first if prompt.row.label is not None]
    return DataLook(
        path,
        measured=len(found.lengths),
        unit=found.unit,
        median=int(np.median(found.lengths)),
        p99=int(np.percentile(found.lengths, 99)),
        longest=int(found.lengths.max()),
        longest_label=_longest(labels, tokenizer),
        bad_rows=len(found.problems),
        first_bad=str(found.problems[0]) if found.problems else "",
        examples=tuple((prompt.text, prompt.row.label) for prompt in found.first[:2]),
    )


def _longest(labels: list[str], tokenizer: CheckpointTokenizer | None) -> int | None:
    """Tokens of the longest label; None where some label has no ids."""
    if tokenizer is None or not labels:
        return None
    try:
        return max(map(len, tokenizer.encode_batch(labels, add_special_tokens=False)))
    except DataError:
        return None
