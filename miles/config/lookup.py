"""Finding a setting by its key or its flag, and the one that a mistyped key or flag means.

SGLang's own server arguments are found here too, under `sglang.<name>` and `--sglang-<name>`.
"""

from __future__ import annotations

from functools import cache

from miles.config.fields import FieldInfo, by_dotted, fields, section_types
from miles.config.sglang_table import server_args
from miles.config.suggest import closest

_SGLANG_FLAG = "--sglang-"


def find_key(dotted: str) -> FieldInfo | None:
    """The setting with this `section.name`."""
    field = by_dotted().get(dotted)
    section, _, name = dotted.partition(".")
    if field is None and section == "sglang" and name in server_args():
        return FieldInfo("sglang", name, _SGLANG_FLAG + name.replace("_", "-"), server_args()[name], (), None)
    return field


def find_flag(flag: str) -> tuple[FieldInfo, bool] | None:
    """The setting that a flag sets, and the value a bare switch gives it."""
    if flag in _flags():
        return _flags()[flag]
    if not flag.startswith(_SGLANG_FLAG):
        return None
    passed_on = find_key("sglang." + flag.removeprefix(_SGLANG_FLAG).replace("-", "_"))
    return (passed_on, True) if passed_on else None


def closest_key(dotted: str) -> str | None:
    """The key that a mistyped `section.name` most likely means: its leaf elsewhere, or one like it."""
    section, _, leaf = dotted.rpartition(".")
    elsewhere = [field.dotted for field in fields() if field.name == leaf]
    if elsewhere:
        return closest(dotted, elsewhere) or elsewhere[0]
    beside = [field.name for field in fields() if field.section == section]
    beside += server_args() if section == "sglang" else []
    if near := closest(leaf, beside):
        return f"{section}.{near}"
    if near := closest(leaf, [field.name for field in fields()]):
        return next(field.dotted for field in fields() if field.name == near)
    return None


def closest_section(name: str) -> str | None:
    """The section that a mistyped one means."""
    return closest(name, section_types())


def closest_flag(flag: str) -> str | None:
    """The flag that a mistyped one means."""
    if flag.startswith(_SGLANG_FLAG):
        near = closest(flag.removeprefix(_SGLANG_FLAG).replace("-", "_"), server_args())
        return near and _SGLANG_FLAG + near.replace("_", "-")
    near = closest(flag.removeprefix("--"), [known.removeprefix("--") for known in _flags()])
    return near and f"--{near}"


@cache
def _flags() -> dict[str, tuple[FieldInfo, bool]]:
    flags = {field.flag: (field, True) for field in fields()}
    assert len(flags) == len(fields()), "two settings share a flag"
    negations = {field.negation: (field, False) for field in fields() if field.negation}
    assert not flags.keys() & negations.keys(), "a negated flag is another setting's flag"
    return flags | negations
