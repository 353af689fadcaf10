"""Settings as text: one explained with the origin of its value, and two configurations side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from miles.config import FieldInfo, Origin, ResolvedConfig, fields
from miles.config.toml_text import literal

WIDTH = 100


def setting_dict(resolved: ResolvedConfig, field: FieldInfo) -> dict[str, Any]:
    """One setting as JSON-able values."""
    return {
        "key": field.dotted,
        "value": resolved.value(field.dotted),
        "origin": str(resolved.origin(field.dotted)),
        "default": field.default,
        "flag": field.flag,
        "type": field.type,
        "help": field.help,
    }


def setting_lines(resolved: ResolvedConfig, field: FieldInfo) -> Iterator[str]:
    """Value, origin and meaning of one setting."""
    origin = resolved.origin(field.dotted)
    yield f"{field.dotted} = {shown(resolved.value(field.dotted))}"
    yield f"    from {origin}" if origin.is_explicit else f"    {origin}"
    yield from textwrap.wrap(field.help, WIDTH, initial_indent="    ", subsequent_indent="    ")
    yield f"    {field.flag} ({field.type}), default {shown(field.default)}"


def shown(value: Any) -> str:
    """A value as in a run file."""
    return "(not set)" if value is None else literal(value)


@dataclass(frozen=True)
class Difference:
    """A setting with two values, each with the place that it came from."""

    key: str
    left: Any
    right: Any
    left_origin: Origin
    right_origin: Origin

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return {
            "key": self.key,
            "left": {"value": self.left, "origin": str(self.left_origin)},
            "right": {"value": self.right, "origin": str(self.right_origin)},
        }


def differences(left: ResolvedConfig, right: ResolvedConfig) -> tuple[Difference, ...]:
    """Every setting that has another value, in the order of the sections; SGLang's own arguments too."""
    keys = dict.fromkeys(field.dotted for field in fields())
    keys |= dict.fromkeys((*left.origins, *right.origins))
    return tuple(
        Difference(key, _value(left, key), _value(right, key), left.origin(key), right.origin(key))
        for key in keys
        if _value(left, key) != _value(right, key)
    )


def _value(resolved: ResolvedConfig, key: str) -> Any:
    """A value; arguments of SGLang that nobody set have none."""
    section, _, name = key.partition(".")
    return getattr(getattr(resolved.config, section), name, None)


def difference_lines(found: Iterable[Difference], left: str, right: str) -> Iterator[str]:
    """`key`, then each side's value with its origin."""
    width = max(len(left), len(right))
    for item in found:
        yield item.key
        for name, value, origin in (
            (left, item.left, item.left_origin),
            (right, item.right, item.right_origin),
        ):
            yield f"  {name:<{width}}  {shown(value)}  ({origin})"
