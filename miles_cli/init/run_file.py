"""The run file that answers make: TOML in which every value says why it is what it is."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from miles._version import __version__
from miles.config.fields import section_types
from miles.config.toml_text import literal
from miles.data.tasks import is_builtin, parse_builtin
from miles_cli.init.answers import as_words
from miles_cli.init.interview import Answer, Interview
from miles_cli.init.questions import BY_ID, CUSTOM, Value

COMMENT_WIDTH = 108


def extends(values: Mapping[str, Value]) -> tuple[str, ...]:
    """The profiles that the run file builds on."""
    return tuple(name.strip() for name in str(values.get("profile", "")).split(",") if name.strip())


def settings(values: Mapping[str, Value]) -> dict[str, tuple[str, Any]]:
    """The keys of the run file: `section.name` to the question it answers and its value."""
    found = dict(_plain(values))
    held_out = values.get("hold_out", 0)
    prompts = str(values.get("prompt_data", ""))
    if held_out and "data.prompt_data" in found:
        found["data.prompt_data"] = ("prompt_data", f"{prompts}@[:-{held_out}]")
        found["eval.eval_prompt_data"] = ("hold_out", ("held_out", f"{prompts}@[-{held_out}:]"))
    elif "eval_prompt_data" in values:
        path = str(values["eval_prompt_data"])
        # None is written down as well: the profile may have a set for its own prompts.
        found["eval.eval_prompt_data"] = ("eval_prompt_data", (_set_name(path), path) if path else ())
    if ids := str(values.get("rollout_stop_token_ids", "")):
        numbers = tuple(int(part) for part in ids.split(","))
        found["rollout.rollout_stop_token_ids"] = ("rollout_stop_token_ids", numbers)
    return found


def _plain(values: Mapping[str, Value]) -> Iterator[tuple[str, tuple[str, Any]]]:
    """Answers that are the value of one key."""
    for question, value in values.items():
        setting = BY_ID[question].setting
        if setting and value != "" and not (question == "rm_type" and value == CUSTOM):
            yield setting, (question, value)


def _set_name(path: str) -> str:
    """The name of an evaluation set: the task of a built-in one, else the name of the file."""
    if is_builtin(path):
        return parse_builtin(path.partition("@[")[0]).task
    return Path(path.partition("@[")[0]).stem


def command(interview: Interview, target: str) -> str:
    """The command that makes the same file without a question."""
    words = ["miles", "init", target, "--yes"]
    for answer in interview.answers:
        words += as_words(answer.question, answer.value)
    return shlex.join(words)


def render(interview: Interview, target: str, facts: Iterable[str] = (), schema: str = "") -> str:
    """The run file. `facts` go into its head, `schema` is the address of the JSON schema for editors."""
    lines = [f"#:schema {schema}"] if schema else []
    lines.append(
        f"# Written by `miles init` {__version__}. Start it: miles train --config {shlex.quote(target)}"
    )
    lines.append("# The same again, without questions:")
    lines.append("#   " + _printable(command(interview, target)))
    lines += [line for fact in facts for line in _comment(fact)]
    profile = interview.answer("profile")
    if profile is not None:
        lines += ["", *_comment(_reason(profile)), f"extends = {literal(extends(interview.values))}"]
    keys = settings(interview.values)
    for section in section_types():
        rows = {key: row for key, row in keys.items() if key.partition(".")[0] == section}
        if rows:
            lines += ["", f"[{section}]", *_section(interview, rows)]
    return "\n".join(lines) + "\n"


def minimal(values: Mapping[str, Value]) -> str:
    """The run file without a comment, for trying answers out."""
    lines = [f"extends = {literal(extends(values))}"]
    lines += [f"{key} = {literal(value)}" for key, (_, value) in settings(values).items()]
    return "\n".join(lines) + "\n"


def _section(interview: Interview, rows: Mapping[str, tuple[str, Any]]) -> Iterator[str]:
    for key, (question, value) in rows.items():
        answer = interview.answer(question)
        assert answer is not None, f"{question} has a value, but was not answered"
        yield from _comment(_reason(answer))
        yield f"{key.partition('.')[2]} = {literal(value)}"


def _reason(answer: Answer) -> str:
    return f"{answer.question.title}: {answer.why}."


def _comment(text: str) -> list[str]:
    """The text as comment lines."""
    return textwrap.wrap(
        _printable(text),
        COMMENT_WIDTH,
        initial_indent="# ",
        subsequent_indent="# ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _printable(text: str) -> str:
    """Without control characters, which could end a comment."""
    return "".join(c if c.isprintable() else " " for c in text)
