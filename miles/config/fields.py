"""The one table of settings: every leaf of RunConfig with its flag, type, default and help.

The flag parser, the profile reader, the reference page and the editor schema are all made from it.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo as PydanticField

from miles.config.help import docstrings
from miles.config.sections import RunConfig, Section
from miles.config.sections.base import Flag


class Kind(StrEnum):
    """What a value is made of, in the words of an error message."""

    BOOL = "true or false"
    INT = "an integer"
    FLOAT = "a number"
    STR = "a string"
    STRINGS = "a list of strings"
    INTEGERS = "a list of integers"
    TABLE = "a table"


_KINDS: dict[object, Kind] = {
    bool: Kind.BOOL,
    int: Kind.INT,
    float: Kind.FLOAT,
    str: Kind.STR,
    tuple[str, ...]: Kind.STRINGS,
    tuple[int, ...]: Kind.INTEGERS,
    dict[str, Any]: Kind.TABLE,
}


@dataclass(frozen=True, slots=True)
class FieldInfo:
    """One setting."""

    section: str
    name: str
    flag: str
    """Spelling on the command line, dashes included."""
    kind: Kind
    choices: tuple[str, ...]
    default: Any

    @property
    def dotted(self) -> str:
        """Its place in a run file: `section.name`."""
        return f"{self.section}.{self.name}"

    @property
    def type(self) -> str:
        """Its type as a reader would write it."""
        return " | ".join(self.choices) if self.choices else self.kind.name.lower()

    @property
    def help(self) -> str:
        """Its help text: the docstring below the field."""
        return docstrings(section_types()[self.section])[self.name]

    @property
    def negation(self) -> str | None:
        """The flag that sets it to false, where it is a switch."""
        if self.kind is not Kind.BOOL:
            return None
        return (
            f"--{self.flag.removeprefix('--no-')}"
            if self.flag.startswith("--no-")
            else f"--no-{self.flag[2:]}"
        )


@cache
def section_types() -> dict[str, type[Section]]:
    """The class of each section, in the order of RunConfig."""
    return {name: _plain(field.annotation)[0] for name, field in RunConfig.model_fields.items()}


@cache
def fields() -> tuple[FieldInfo, ...]:
    """Every setting, in the order of the sections."""
    return tuple(
        _describe(section, name, field)
        for section, model in section_types().items()
        for name, field in model.model_fields.items()
    )


@cache
def by_dotted() -> dict[str, FieldInfo]:
    """The table by `section.name`."""
    return {field.dotted: field for field in fields()}


def _describe(section: str, name: str, field: PydanticField) -> FieldInfo:
    kind_type, choices = _plain(field.annotation)
    spelled = next((item.name for item in field.metadata if isinstance(item, Flag)), None)
    prefix = "--sglang-" if section == "sglang" else "--"
    flag = spelled or prefix + name.replace("_", "-")
    default = field.get_default(call_default_factory=True, validated_data={})
    return FieldInfo(section, name, flag, _KINDS[kind_type], choices, default)


def _plain(annotation: Any) -> tuple[Any, tuple[str, ...]]:
    """The type under `Annotated`, `| None` and `Literal`, and the literal's choices."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _plain(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return _plain(next(arm for arm in get_args(annotation) if arm is not type(None)))
    if origin is Literal:
        return str, get_args(annotation)
    return annotation, ()
