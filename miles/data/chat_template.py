"""Chat templates: a checkpoint's Jinja source, rendered the way `transformers` renders it.

The environment (trimming, sandbox, `tojson`, `raise_exception`, `strftime_now`, the `generation` block,
missing keys for null values) follows transformers' utils/chat_template_utils.py, so that a prompt has the
same ids here, in SGLang, and in the user's notebook.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from miles.data.sample import Message
from miles.errors import CheckpointError, DataError


@dataclass(frozen=True)
class ChatTemplate:
    """One Jinja template and the special tokens it may name (`bos_token`, `eos_token`, …)."""

    source: str
    where: str
    """File the source was read from, for messages."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _compiled(self) -> jinja2.Template:
        try:
            return _environment().from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"the chat template does not parse: {error.message}",
                where=f"{self.where}, template line {error.lineno}",
                fix="give a working template with --chat-template-path",
            ) from error

    def render(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt text. Raises DataError when the template refuses these messages."""
        if not messages:
            raise DataError("a conversation without messages", where=self.where)
        present = [{key: value for key, value in m.items() if value is not None} for m in messages]
        variables = {**self.special_tokens, **kwargs}
        template = self._compiled
        try:
            return template.render(
                messages=present,
                tools=tools,
                documents=variables.pop("documents", None),
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            # A template written for other message shapes fails inside its own Python-like expressions.
            raise DataError(
                f"the chat template refuses the messages: {error}",
                where=self.where,
                why=f"roles: {', '.join(str(m.get('role')) for m in messages)}",
            ) from error


def load_chat_template(
    checkpoint: Path, tokenizer_config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> dict[str, ChatTemplate]:
    """All templates of a checkpoint by name, `default` first; empty when it has none.

    chat_template.jinja and additional_chat_templates/*.jinja win over tokenizer_config.json.
    """
    files = {"default": checkpoint / "chat_template.jinja"}
    files |= {p.stem: p for p in sorted((checkpoint / "additional_chat_templates").glob("*.jinja"))}
    from_files = {
        name: ChatTemplate(path.read_text(encoding="utf-8"), str(path), special_tokens)
        for name, path in files.items()
        if path.is_file()
    }
    if from_files:
        return from_files
    where = str(checkpoint / "tokenizer_config.json")
    configured = tokenizer_config.get("chat_template")
    if configured is None:
        return {}
    if isinstance(configured, str):
        configured = [{"name": "default", "template": configured}]
    return {t["name"]: ChatTemplate(t["template"], where, special_tokens) for t in configured}


def choose_template(templates: Mapping[str, ChatTemplate], with_tools: bool) -> ChatTemplate | None:
    """`tool_use` for a conversation with tools where there is one, else `default`; None without either."""
    if with_tools and "tool_use" in templates:
        return templates["tool_use"]
    return templates.get("default")


class _GenerationBlock(Extension):
    """`{% generation %}` marks what the assistant wrote; a prompt renders its body as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return str(caller())


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
