"""From a row to a prompt: which columns hold what, and when a row is malformed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from miles.data.rows import Row
from miles.data.sample import Message, Sample
from miles.data.tokenizer import CheckpointTokenizer
from miles.errors import DataError

DEFAULT_METADATA_KEY = "metadata"
DEFAULT_TOOL_KEY = "tools"


class BadRow(ValueError):
    """Why a row cannot become a prompt."""


@dataclass(frozen=True)
class PromptKeys:
    """Columns of a prompt file.

    `input` and `label` (where set) are required in every row. `metadata` and `tools` are optional under their
    default names; a name that the user chose is required as well, so that a typing mistake cannot pass
    unnoticed.
    """

    input: str = "input"
    label: str | None = None
    metadata: str = DEFAULT_METADATA_KEY
    tools: str = DEFAULT_TOOL_KEY

    def required(self) -> tuple[str, ...]:
        chosen = [self.input, self.label]
        chosen += [self.metadata] if self.metadata != DEFAULT_METADATA_KEY else []
        chosen += [self.tools] if self.tools != DEFAULT_TOOL_KEY else []
        return tuple(key for key in chosen if key is not None)


@dataclass(frozen=True)
class PromptRow:
    """The parts of one well-formed row."""

    prompt: str | list[Message]
    label: str | None
    metadata: dict[str, Any]
    tools: list[dict[str, Any]] | None


@dataclass(frozen=True)
class Prompt:
    """A prompt as the policy will see it."""

    index: int
    """Row index in the file, counted from 0."""
    row: PromptRow
    text: str
    """What was tokenised: the row's text, or its messages under the chat template."""
    token_ids: tuple[int, ...]

    def sample(self, index: int | None = None, group_index: int | None = None) -> Sample:
        """A pending Sample of this prompt; tool definitions travel in its metadata."""
        metadata = dict(self.row.metadata)
        if self.row.tools is not None:
            metadata["tools"] = self.row.tools
        return Sample(
            prompt=self.row.prompt,
            tokens=list(self.token_ids),
            label=self.row.label,
            metadata=metadata,
            index=index,
            group_index=group_index,
        )


@dataclass(frozen=True)
class PromptFormat:
    """How the text of a row becomes ids."""

    tokenizer: CheckpointTokenizer
    apply_chat_template: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.apply_chat_template:
            self.tokenizer.require_chat_template()

    def encode(self, index: int, row: PromptRow) -> Prompt:
        """Render and tokenise. Raises BadRow when the template or the tokenizer refuses this row.

        Under the chat template a text is one user message, and the template brings its own special tokens;
        plain text gets those that the tokenizer adds by itself.
        """
        try:
            text = self.render(row)
            ids = self.tokenizer.encode(text, add_special_tokens=not self.apply_chat_template)
            return Prompt(index, row, text, tuple(ids))
        except DataError as error:
            raise BadRow(f"{error.what} ({error.why})" if error.why else error.what) from error

    def render(self, row: PromptRow) -> str:
        """The text that is tokenised. Raises DataError when the template refuses, BadRow without one."""
        messages = row.prompt
        if not self.apply_chat_template:
            if not isinstance(messages, str):
                raise BadRow("the prompt is a list of messages, which needs --apply-chat-template")
            return messages
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.tokenizer.render_chat(messages, row.tools, **self.chat_template_kwargs)


def parse_row(row: Row, keys: PromptKeys) -> PromptRow:
    """Take the parts of a row. Raises BadRow that names the missing or wrong column."""
    missing = [key for key in keys.required() if key not in row]
    if missing:
        names = ", ".join(map(repr, missing))
        raise BadRow(f"no {names}; the row has {', '.join(map(repr, row)) or 'no keys'}")
    return PromptRow(
        prompt=_prompt(row[keys.input], keys.input),
        label=None if keys.label is None else _label(row[keys.label], keys.label),
        metadata=_metadata(row.get(keys.metadata), keys.metadata),
        tools=_tools(row.get(keys.tools), keys.tools),
    )


def _prompt(value: Any, key: str) -> str | list[Message]:
    if isinstance(value, str):
        if not value:
            raise BadRow(f"{key!r} is an empty text")
        return value
    if not isinstance(value, list) or not value:
        raise BadRow(f"{key!r} is {_kind(value)}, neither text nor a list of messages")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRow(f"message {i} of {key!r} is no object with a role")
    return value


def _label(value: Any, key: str) -> str:
    """Labels are text; any other JSON value stands as its JSON text (`42`, `["a", "b"]`)."""
    if value is None:
        raise BadRow(f"{key!r} is null")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _metadata(value: Any, key: str) -> dict[str, Any]:
    value = _decoded(value, key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadRow(f"{key!r} is {_kind(value)}, not an object")
    return value


def _tools(value: Any, key: str) -> list[dict[str, Any]] | None:
    value = _decoded(value, key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow(f"{key!r} is {_kind(value)}, not a list of tool definitions")
    return value or None


def _decoded(value: Any, key: str) -> Any:
    """Columns of tables often hold nested values as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise BadRow(f"{key!r} is text that is not JSON: {error.msg}") from error


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text"}
    names |= {list: "a list", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")
