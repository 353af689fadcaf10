"""One written-down value with its place, and the check of its type before anything is merged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from miles.config.fields import FieldInfo, Kind, by_dotted
from miles.config.lookup import find_key
from miles.config.origin import Origin
from miles.config.sections import RunConfig
from miles.config.suggest import closest, did_you_mean
from miles.config.toml_text import literal
from miles.errors import MilesError


class _Unset:
    """The value of `--set key=default`: forget what weaker sources said."""


UNSET = _Unset()


@dataclass(frozen=True, slots=True)
class Assignment:
    """`section.name = value`, and where that was written."""

    dotted: str
    value: Any
    origin: Origin


def nested(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`."""
    sections: dict[str, dict[str, Any]] = {}
    for dotted, value in values.items():
        section, _, name = dotted.partition(".")
        sections.setdefault(section, {})[name] = value
    return sections


def check(assignments: Iterable[Assignment]) -> dict[str, MilesError]:
    """Every assignment whose value has the wrong type or lies outside its bounds, by its key."""
    written = {item.dotted: item for item in assignments if item.value is not UNSET}
    problems = {item.dotted: problem for item in written.values() if (problem := _passed_on_problem(item))}
    try:
        RunConfig.model_validate(nested({dotted: item.value for dotted, item in written.items()}))
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            dotted = ".".join(str(part) for part in detail["loc"][:2])
            problems.setdefault(dotted, _type_problem(written[dotted], dict(detail)))
    return problems


def _type_problem(item: Assignment, detail: dict[str, Any]) -> MilesError:
    """A pydantic complaint in our words."""
    field = by_dotted()[item.dotted]
    if field.choices:
        near = closest(str(item.value), field.choices)
        allowed = "one of " + ", ".join(literal(choice) for choice in field.choices)
        return _must_be(item, allowed, did_you_mean(literal(near) if near else None))
    if detail["type"].endswith("_type"):
        return _must_be(item, str(field.kind), _how_to_write(field, item.value))
    return _must_be(item, detail["msg"].removeprefix("Input should be "))


def _passed_on_problem(item: Assignment) -> MilesError | None:
    """SGLang's own arguments are checked against its table: a wrong kind would only fail in the server."""
    if not item.dotted.startswith("sglang.") or item.dotted in by_dotted():
        return None
    field = find_key(item.dotted)
    assert field, f"{item.dotted} was not looked up"
    accepted: dict[Kind, tuple[type, ...]] = {
        Kind.BOOL: (bool,),
        Kind.INT: (int,),
        Kind.FLOAT: (int, float),
        Kind.STR: (str, int, float, dict, list),
        Kind.STRINGS: (list, tuple),
        Kind.INTEGERS: (list, tuple),
        Kind.TABLE: (dict, str),
    }
    fits = isinstance(item.value, accepted[field.kind])
    if fits and (field.kind is Kind.BOOL or not isinstance(item.value, bool)):
        return None
    return _must_be(item, str(field.kind), _how_to_write(field, item.value))


def _must_be(item: Assignment, allowed: str, fix: str = "") -> MilesError:
    what = f"{item.dotted} must be {allowed}; it is {literal(item.value)}{_kind_of(item.value)}"
    return MilesError(what, where=str(item.origin), fix=fix)


def _kind_of(value: Any) -> str:
    return ", a string" if isinstance(value, str) else ""


def _how_to_write(field: FieldInfo, value: Any) -> str:
    """What to type instead, where that is plain."""
    if isinstance(value, str) and field.kind in (Kind.INT, Kind.FLOAT, Kind.BOOL):
        return f"write {field.name} = {value.strip() or 'a value'}, without quotes"
    if field.kind is Kind.STR and isinstance(value, int | float):
        return f'write {field.name} = "{value}", in quotes'
    if field.kind is Kind.INT and isinstance(value, float) and value.is_integer():
        return f"write {field.name} = {int(value)}"
    if field.kind in (Kind.STRINGS, Kind.INTEGERS) and not isinstance(value, list | dict):
        return f"write {field.name} = [{literal(value)}]"
    return ""


def merge(layers: Iterable[Iterable[Assignment]]) -> dict[str, Assignment]:
    """The strongest assignment of each key; layers come weakest first."""
    merged: dict[str, Assignment] = {}
    for item in _flatten(layers):
        if item.value is UNSET:
            merged.pop(item.dotted, None)
        else:
            merged[item.dotted] = item
    return merged


def _flatten(layers: Iterable[Iterable[Assignment]]) -> Iterator[Assignment]:
    for layer in layers:
        yield from layer
