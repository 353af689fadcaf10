"""A resolved run file as text: TOML with origins for people, JSON that reads back for the run directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

from miles.config.fields import section_types
from miles.config.origin import Origin
from miles.config.resolved import ResolvedConfig
from miles.config.sections import RunConfig
from miles.config.toml_text import literal

_COMMENT_COLUMN = 48


def dump_toml(resolved: ResolvedConfig, defaults: bool = False) -> str:
    """The run file with the origin of each value beside it.

    Explicit values are keys; derived ones (and, when asked for, defaults) are comments, so the text resolves
    to the same configuration and a changed value still moves what is derived from it.
    """
    blocks = []
    for section in section_types():
        lines = list(_section_lines(resolved, section, defaults))
        if lines:
            blocks.append("\n".join([f"[{section}]", *lines]))
    return "\n\n".join(blocks) + "\n"


def _section_lines(resolved: ResolvedConfig, section: str, defaults: bool) -> Iterator[str]:
    for name, value in getattr(resolved.config, section):
        origin = resolved.origin(f"{section}.{name}")
        if origin.is_explicit:
            yield f"{f'{name} = {literal(value)}':<{_COMMENT_COLUMN}} # {origin}"
        elif defaults or str(origin) != "default":
            shown = "(not set)" if value is None else literal(value)
            yield f"{f'# {name} = {shown}':<{_COMMENT_COLUMN}} # {origin}"


def to_json(resolved: ResolvedConfig) -> str:
    """Values and origins as JSON; `from_json` reads it back without loss."""
    content = {
        "profile": resolved.profile,
        "values": resolved.config.model_dump(),
        "origins": {dotted: origin.as_json() for dotted, origin in resolved.origins.items()},
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def from_json(text: str) -> ResolvedConfig:
    """The inverse of `to_json`. Nothing is derived or checked against other settings again."""
    content = json.loads(text)
    origins = {dotted: Origin.from_json(entries) for dotted, entries in content["origins"].items()}
    config = RunConfig.model_validate(content["values"])
    return ResolvedConfig(config, MappingProxyType(origins), content["profile"])


def config_hash(config: RunConfig) -> str:
    """SHA-256 of the values, whatever their origin: equal for runs that were told the same."""
    return hashlib.sha256(json.dumps(config.model_dump(), sort_keys=True).encode()).hexdigest()


def json_schema() -> dict[str, Any]:
    """The JSON schema of a run file, for editors: help texts, choices and bounds of every key."""
    from miles.config.help import docstrings

    schema = RunConfig.model_json_schema()
    for section, model in section_types().items():
        definition = schema["$defs"][model.__name__]
        for name, text in docstrings(model).items():
            definition["properties"][name]["description"] = text
        schema["properties"][section] = {"$ref": f"#/$defs/{model.__name__}"}
    schema["properties"] |= {
        "extends": {
            "description": "Profiles that this one builds on, weakest first.",
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        },
        "description": {"description": "One line for `miles profiles ls`.", "type": "string"},
    }
    return schema
