"""What a prompt file holds: its length, its columns, and how long its prompts are, from the first rows."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from miles.data.prompts import BadRow, PromptFormat, PromptKeys, parse_row
from miles.data.rows import BadJson, RowFile, open_rows, parse_data_path
from miles.data.tasks import PREFIX, is_builtin, parse_builtin
from miles.errors import DataError

if TYPE_CHECKING:
    from miles.data.tokenizer import CheckpointTokenizer

SAMPLED_ROWS = 64

SOLUTION_CHARACTERS = 200
"""A label longer than this is no answer that a response could repeat word by word."""


@dataclass(frozen=True)
class DataFacts:
    """One prompt set as preflight sees it, judged by its first `SAMPLED_ROWS` rows.

    `setting` is the key of RunConfig that names the file, `columns` the (setting, column) pairs it must have.
    """

    name: str
    path: str
    setting: str
    columns: tuple[tuple[str, str], ...]
    exists: bool
    problem: str = ""
    suggestion: str = ""
    num_rows: int | None = None
    keys: frozenset[str] = frozenset()
    sampled_rows: int = 0
    bad_rows: tuple[tuple[int, str], ...] = ()
    has_messages: bool = False
    unlabelled: int = 0
    """Sampled rows whose label is absent or empty, where a label column is named."""
    solutions: int = 0
    """Sampled rows whose label is a worked solution rather than an answer, by its length or a `####` line."""
    prompt_tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class DataRequest:
    """What to look at, and how the run will read it."""

    name: str
    path: str
    setting: str
    keys: PromptKeys
    columns: tuple[tuple[str, str], ...]
    prompt_format: PromptFormat | None


def prompt_format(
    tokenizer: CheckpointTokenizer | None, apply_chat_template: bool, kwargs: dict[str, object]
) -> PromptFormat | None:
    """The format that turns rows into ids, where there is a tokenizer that can."""
    if tokenizer is None or (apply_chat_template and not tokenizer.chat_templates):
        return None
    return PromptFormat(tokenizer, apply_chat_template, kwargs)


def read_data(request: DataRequest) -> DataFacts:
    """Facts of one prompt set; a file that is missing or unreadable is a fact, not an error."""
    if is_builtin(request.path):
        return _builtin(request)
    try:
        data_path = parse_data_path(request.path)
        exists = data_path.path.is_file()
        rows = open_rows(data_path.path)
    except DataError as error:
        path = Path(request.path.partition("@[")[0])
        return _unread(request, path.is_file(), error.what, _similar(path))
    indices = data_path.indices(len(rows))
    return _sampled(request, rows, indices, exists)


def _unread(request: DataRequest, exists: bool, problem: str, suggestion: str = "") -> DataFacts:
    return DataFacts(
        request.name, request.path, request.setting, request.columns, exists, problem, suggestion
    )


def _similar(path: Path) -> str:
    """A file beside the missing one with nearly its name."""
    if path.exists() or not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return str(path.parent / near[0]) if near else ""


def _sampled(request: DataRequest, rows: RowFile, indices: range, exists: bool) -> DataFacts:
    keys: set[str] = set()
    bad: list[tuple[int, str]] = []
    lengths: list[int] = []
    good = has_messages = unlabelled = solutions = 0
    for index in islice(indices, SAMPLED_ROWS):
        try:
            row = rows.read(index)
            keys.update(row)
            parsed = parse_row(row, request.keys)
            good += 1
            has_messages += not isinstance(parsed.prompt, str)
            unlabelled += request.keys.label is not None and not (parsed.label or "").strip()
            solutions += _is_solution(parsed.label or "")
            if request.prompt_format is not None and (
                request.prompt_format.apply_chat_template or isinstance(parsed.prompt, str)
            ):
                lengths.append(len(request.prompt_format.encode(index, parsed).token_ids))
        except (BadJson, BadRow) as error:
            bad.append((rows.line(index), str(error)))
    missing_columns = bool(keys) and any(column not in keys for _, column in request.columns)
    hopeless = bad and not good and not missing_columns
    return DataFacts(
        name=request.name,
        path=request.path,
        setting=request.setting,
        columns=request.columns,
        exists=exists,
        problem=f"line {bad[0][0]}: {bad[0][1]}" if hopeless else "",
        num_rows=len(indices),
        keys=frozenset(keys),
        sampled_rows=good + len(bad),
        bad_rows=() if missing_columns and not good else tuple(bad),
        has_messages=bool(has_messages),
        unlabelled=unlabelled,
        solutions=solutions,
        prompt_tokens=tuple(lengths),
    )


def _is_solution(label: str) -> bool:
    """GSM8K ends a worked solution with `#### 72`; other sets are only long."""
    return "\n####" in label or len(label) > SOLUTION_CHARACTERS


def _builtin(request: DataRequest) -> DataFacts:
    """Facts of a built-in set from its recipe; nothing is written."""
    from miles.data.tasks import sort

    name, at, bounds = request.path.partition("@[")
    asked = {"input", "label"}
    parts = {
        "train": (sort.NUM_TRAIN, asked),
        "test": (sort.NUM_TEST, asked),
        "demonstrations": (sort.NUM_DEMONSTRATIONS, {"prompt", "response"}),
    }
    try:
        builtin = parse_builtin(name)
    except DataError as error:
        return _unread(request, False, error.what)
    if builtin.task != "sort" or builtin.part not in parts:
        known = ", ".join(f"{PREFIX}sort/{part}" for part in parts)
        return _unread(request, False, f"is not built in; there are {known}")
    size, keys = parts[builtin.part]
    try:
        rows = parse_data_path(f"rows{at}{bounds}").indices(size)
    except DataError as error:
        return _unread(request, True, error.what)
    return DataFacts(
        name=request.name,
        path=request.path,
        setting=request.setting,
        columns=request.columns,
        exists=True,
        num_rows=len(rows),
        keys=frozenset(keys),
        sampled_rows=len(rows),
        prompt_tokens=(len("sort =") + sort.MAX_DIGITS,),
    )
