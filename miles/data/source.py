"""The prompt source: an endless, reproducible and resumable stream of prompt groups from one file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from miles.data.length_book import LengthBook
from miles.data.prompts import BadRow, Prompt, PromptFormat, PromptKeys, parse_row
from miles.data.rows import BadJson, DataPath, RowFile, file_digest, iterate, open_rows
from miles.data.sample import Sample
from miles.errors import DataError

BadRowPolicy = Literal["skip", "refuse"]
ProblemKind = Literal["malformed", "too_long"]
SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class Problem:
    """One row that is left out."""

    line: int
    """Line of a text file, row of a table; counted from 1."""
    kind: ProblemKind
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


@dataclass(frozen=True)
class SourceSettings:
    """What a run decides about its prompts."""

    keys: PromptKeys = field(default_factory=PromptKeys)
    shuffle: bool = False
    seed: int = 42
    """The rollout seed: with the epoch it fixes the order of prompts."""
    max_prompt_len: int | None = None
    """Tokens; longer prompts are left out and counted."""
    on_bad_row: BadRowPolicy = "skip"
    n_samples_per_prompt: int = 1


@dataclass(frozen=True)
class Cursor:
    """Where the stream stands; everything a resumed run needs."""

    epoch: int = 0
    position: int = 0
    """Rows of this epoch's order already consumed, left-out ones included."""
    next_group: int = 0
    """Group index of the next prompt, counted over the whole run."""

    def to_dict(self) -> dict[str, int]:
        return dict(vars(self))


PickHeld = Callable[[Sequence[list[Sample]], int], list[list[Sample]]]
"""From the held groups to those that go on now, at most so many."""


def oldest_first(held: Sequence[list[Sample]], n: int) -> list[list[Sample]]:
    """The first `n`."""
    return list(held[:n])


class PromptSource:
    """Prompts of one file in a fixed order per (seed, epoch)."""

    def __init__(self, path: DataPath, prompt_format: PromptFormat, settings: SourceSettings) -> None:
        """Open the file and check every selected row once.

        Raises DataError for a missing or empty file, a slice or a file without a usable row, and, under
        `on_bad_row="refuse"`, for the first malformed rows by line number.
        """
        self.path, self.settings, self._format = path, settings, prompt_format
        self.problems: list[Problem] = []
        """Rows left out so far, in the order of discovery; grows while prompts are drawn. Each row once."""
        self._left_out: set[int] = set()
        self._rows: RowFile = open_rows(path.path)
        self._indices = self._usable_rows()
        self._digest = file_digest(path.path)
        self._cursor = Cursor()
        self._order = self._epoch_order(0)
        self.held: list[list[Sample]] = []
        """Groups drawn before that wait to go on, the oldest first; they come before new prompts."""
        self.pick: PickHeld = oldest_first
        """Which of them go on now."""
        self.lengths = LengthBook()
        """What the owner tells it about the responses to its prompts."""

    def __len__(self) -> int:
        """Rows of one epoch: the well-formed ones; too long prompts are found only when they are drawn."""
        return len(self._indices)

    @property
    def epoch(self) -> int:
        return self._cursor.epoch

    def problem_counts(self) -> dict[str, int]:
        """Rows left out so far by kind; a kind without rows is absent."""
        return dict(Counter(problem.kind for problem in self.problems))

    def next_groups(self, n: int) -> list[list[Sample]]:
        """The next `n` groups: held ones, then prompts as `n_samples_per_prompt` pending samples each; epochs
        follow one another.
        """
        held = self.pick(self.held, n)
        taken = {id(group) for group in held}
        self.held = [group for group in self.held if id(group) not in taken]
        return [*held, *(self._next_group() for _ in range(n - len(held)))]

    def put_back(self, groups: Sequence[list[Sample]]) -> None:
        """Hold groups that were drawn and not used up, in order of their group index."""
        self.held = sorted([*self.held, *groups], key=lambda group: group[0].group_index or 0)

    def prompts(self) -> Iterator[Prompt]:
        """Every usable prompt once, in file order, without moving the stream: what an evaluation reads.

        Raises DataError at the end when there was none.
        """
        found = False
        for index in self._indices:
            prompt = self._prompt(index)
            if prompt is not None:
                found = True
                yield prompt
        if not found:
            raise self._nothing_usable("no prompt of the file can be used")

    def state(self) -> dict[str, Any]:
        """The cursor and what it belongs to, and the lengths seen, as JSON-able values."""
        return {**self._cursor.to_dict(), **self._identity(), "lengths": self.lengths.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where `state` stood. Raises DataError when the file is not the one it was taken from."""
        for name, now in self._identity().items():
            if state[name] != now:
                raise DataError(
                    "the prompts or their order changed since the checkpoint was written",
                    where=str(self.path),
                    why=f"{name} was {state[name]} and is {now}",
                    fix="bring the old file and settings back, or start a new run from the checkpoint",
                )
        self._cursor = Cursor(*(int(state[name]) for name in ("epoch", "position", "next_group")))
        self._order = self._epoch_order(self._cursor.epoch)
        self.lengths.load_state(state["lengths"])

    def _identity(self) -> dict[str, int | str]:
        """What fixes the order of prompts; a cursor means nothing beside another one."""
        shuffle_seed = self.settings.seed if self.settings.shuffle else "no shuffle"
        return {"digest": self._digest, "rows": len(self), "shuffle_seed": shuffle_seed}

    def _next_group(self) -> list[Sample]:
        start_epoch, start_group = self._cursor.epoch, self._cursor.next_group
        while True:
            index = self._advance()
            prompt = self._prompt(index)
            if prompt is not None:
                break
            if self._cursor.epoch > start_epoch + 1:
                raise self._nothing_usable("no prompt of a whole epoch can be used")
        self._cursor = Cursor(self._cursor.epoch, self._cursor.position, start_group + 1)
        n = self.settings.n_samples_per_prompt
        return [prompt.sample(index=start_group * n + i, group_index=start_group) for i in range(n)]

    def _advance(self) -> int:
        """Consume one row of the epoch's order and return its index in the file."""
        cursor = self._cursor
        if cursor.position == len(self._order):
            cursor = Cursor(cursor.epoch + 1, 0, cursor.next_group)
            self._order = self._epoch_order(cursor.epoch)
        self._cursor = Cursor(cursor.epoch, cursor.position + 1, cursor.next_group)
        return int(self._indices[self._order[cursor.position]])

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if not self.settings.shuffle:
            return np.arange(len(self._indices))
        return np.random.Generator(np.random.PCG64([self.settings.seed, epoch])).permutation(
            len(self._indices)
        )

    def _prompt(self, index: int) -> Prompt | None:
        """The prompt of a well-formed row, or None when its rendering fails or it is too long."""
        row = parse_row(self._rows.read(index), self.settings.keys)
        try:
            prompt = self._format.encode(index, row)
        except BadRow as error:
            self._leave_out(index, "malformed", str(error))
            if self.settings.on_bad_row == "refuse":
                raise self._refusal() from error
            return None
        limit = self.settings.max_prompt_len
        if limit is not None and len(prompt.token_ids) > limit:
            reason = f"the prompt has {len(prompt.token_ids)} tokens, the limit is {limit}"
            self._leave_out(index, "too_long", reason)
            return None
        return prompt

    def _usable_rows(self) -> np.ndarray:
        selected = self.path.indices(len(self._rows))
        if not selected:
            raise DataError(
                "the slice selects no row", where=str(self.path), why=f"the file has {len(self._rows)} rows"
            )
        usable, malformed = usable_rows(self._rows, selected, self.settings.keys)
        self.problems.extend(malformed)
        if self.problems and self.settings.on_bad_row == "refuse":
            raise self._refusal()
        if not len(usable):
            raise self._nothing_usable("no row of the prompt file can be used")
        return usable

    def _leave_out(self, index: int, kind: ProblemKind, reason: str) -> None:
        if index not in self._left_out:
            self._left_out.add(index)
            self.problems.append(Problem(self._rows.line(index), kind, reason))

    def _refusal(self) -> DataError:
        malformed = [p for p in self.problems if p.kind == "malformed"]
        return DataError(
            f"{len(malformed)} malformed row{'s' if len(malformed) > 1 else ''}",
            where=f"{self.path.path}:{malformed[0].line}",
            why=_listing(malformed),
            fix='mend the rows, or leave them out with --on-bad-row "skip"',
        )

    def _nothing_usable(self, what: str) -> DataError:
        return DataError(
            what,
            where=str(self.path),
            why=_listing(self.problems),
            fix="check --input-key, --label-key, --apply-chat-template, --rollout-max-prompt-len and "
            "--eval-max-prompt-len",
        )


def usable_rows(rows: RowFile, selected: range, keys: PromptKeys) -> tuple[np.ndarray, list[Problem]]:
    """Indices (int64) of the well-formed rows among `selected`, and what is wrong with the others."""
    usable: list[int] = []
    problems: list[Problem] = []
    for index, row in iterate(rows, selected):
        try:
            if isinstance(row, BadJson):
                raise BadRow(str(row)) from row
            parse_row(row, keys)
        except BadRow as error:
            problems.append(Problem(rows.line(index), "malformed", str(error)))
        else:
            usable.append(index)
    return np.array(usable, dtype=np.int64), problems


def _listing(problems: list[Problem]) -> str:
    shown = "; ".join(str(problem) for problem in problems[:SHOWN_PROBLEMS])
    more = len(problems) - SHOWN_PROBLEMS
    return f"{shown}; and {more} more" if more > 0 else shown
