"""A look at a prompt file before a run: lengths of its prompts, rows that are left out, the first prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from miles.data.prompts import BadRow, PromptFormat, PromptKeys, PromptRow, parse_row
from miles.data.rows import DataPath, RowFile, open_rows
from miles.data.source import Problem, usable_rows
from miles.errors import DataError

MEASURED_ROWS = 10_000
"""Lengths are measured on this many rows at most."""


@dataclass(frozen=True)
class SurveyedPrompt:
    """One row as the run will see it; `token_ids` is None without a tokenizer."""

    line: int
    row: PromptRow
    text: str
    token_ids: tuple[int, ...] | None

    @property
    def length(self) -> int:
        """Tokens, or characters without a tokenizer."""
        return len(self.text) if self.token_ids is None else len(self.token_ids)


@dataclass(frozen=True)
class Survey:
    """What `survey` found."""

    path: str
    num_rows: int
    """Rows of the slice."""
    num_usable: int
    """Rows that a run can use, as far as they were measured."""
    first: tuple[SurveyedPrompt, ...]
    problems: tuple[Problem, ...]
    unit: Literal["tokens", "characters"]
    lengths: np.ndarray
    """int64, lengths of the measured prompts, those above the limit included."""


def survey(
    path: DataPath,
    keys: PromptKeys,
    prompt_format: PromptFormat | None = None,
    first: int = 5,
    max_prompt_len: int | None = None,
) -> Survey:
    """Check every row of a prompt file and measure its prompts.

    Without `prompt_format` nothing is tokenised and `max_prompt_len` must be None. Raises DataError for a
    file that is missing, empty or of an unknown kind, and for a slice without rows.
    """
    assert prompt_format is not None or max_prompt_len is None, "a limit in tokens needs a tokenizer"
    rows = open_rows(path.path)
    selected = path.indices(len(rows))
    if not selected:
        raise DataError("the slice selects no row", where=str(path), why=f"the file has {len(rows)} rows")
    usable, problems = usable_rows(rows, selected, keys)
    shown: list[SurveyedPrompt] = []
    lengths: list[int] = []
    for index in usable[:MEASURED_ROWS].tolist():
        try:
            prompt = _surveyed(rows, index, keys, prompt_format)
        except BadRow as error:
            problems.append(Problem(rows.line(index), "malformed", str(error)))
            continue
        lengths.append(prompt.length)
        if max_prompt_len is not None and prompt.length > max_prompt_len:
            reason = f"the prompt has {prompt.length} tokens, the limit is {max_prompt_len}"
            problems.append(Problem(prompt.line, "too_long", reason))
        elif len(shown) < first:
            shown.append(prompt)
    return Survey(
        path=str(path),
        num_rows=len(selected),
        num_usable=len(selected) - len(problems),
        first=tuple(shown),
        problems=tuple(sorted(problems, key=lambda problem: problem.line)),
        unit="characters" if prompt_format is None else "tokens",
        lengths=np.array(lengths, dtype=np.int64),
    )


def _surveyed(
    rows: RowFile, index: int, keys: PromptKeys, prompt_format: PromptFormat | None
) -> SurveyedPrompt:
    row = parse_row(rows.read(index), keys)
    if prompt_format is not None:
        prompt = prompt_format.encode(index, row)
        return SurveyedPrompt(rows.line(index), row, prompt.text, prompt.token_ids)
    if isinstance(row.prompt, str):
        text = row.prompt
    else:
        text = "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in row.prompt)
    return SurveyedPrompt(rows.line(index), row, text, None)
