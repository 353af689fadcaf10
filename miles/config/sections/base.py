"""What every section is: frozen, strict, closed; and the few field types they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict


class Section(BaseModel):
    """A frozen group of settings: unknown keys, `"8"` for an integer, and non-finite numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Flag:
    """Field metadata: the flag's spelling where it is not the field's own name in kebab-case."""

    name: str


Strings = Annotated[tuple[str, ...], Strict(False)]
"""A list of strings in TOML, a tuple here; its items stay strict."""

Integers = Annotated[tuple[int, ...], Strict(False)]
"""A list of integers in TOML, a tuple here; its items stay strict."""

Table = dict[str, Any]
"""A free table (JSON on the command line)."""

Port = Annotated[int, Field(ge=0, le=65535)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
