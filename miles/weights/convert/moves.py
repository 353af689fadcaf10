"""What becomes of one weight: copied as it is stored, cast, quantised, dequantised or made anew; experts also
split out of a stacked tensor, or stacked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from miles.arch import ArchSpec
from miles.arch.precision import NumberFormat, PrecisionPolicy
from miles.arch.stored_forms import FP8_BLOCK, Form, stored_forms
from miles.arch.stored_weights import StoredWeight
from miles.weights.convert.wanted import Wanted

How = Literal["copied", "cast", "quantised", "dequantised", "requantised", "split", "stacked", "new"]


@dataclass(frozen=True)
class Move:
    """One weight on its way."""

    weight: StoredWeight
    target: NumberFormat | None
    """None: numbers that no format applies to."""
    forms: Mapping[str, Form]
    """The tensors that are written, by published name."""
    how: How
    why: str = ""
    """Why the weight is quantised, or is not, by the precision policy."""
    unfit: str = ""
    """Why the format cannot hold it; empty where it can."""

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def numel(self) -> int:
        return prod(self.weight.shape)


def move(weight: StoredWeight, wanted: Wanted, policy: PrecisionPolicy | None, spec: ArchSpec) -> Move:
    """What a conversion does with a weight."""
    target = wanted.format_of(weight, policy, spec)
    why = policy.of(weight.name).reason if policy is not None and wanted.is_quantised else ""
    if not weight.parts:
        unfit = _unfit(weight, target)
        return Move(weight, target, {} if unfit else _forms(weight, target), "new", why, unfit)
    held = {name: (entry.dtype, entry.shape) for name, entry in weight.parts.items()}
    as_held = weight.cut is None and not weight.pieces
    if as_held and (target is None or (wanted.format is None and target == weight.format)):
        return Move(weight, target, held, "copied", why)
    if unfit := _unfit(weight, target):
        return Move(weight, target, {}, "quantised", why, unfit)
    forms = _forms(weight, target)
    assert weight.format is not None and target is not None
    if as_held and _same(weight, target, held, forms):
        return Move(weight, target, held, "copied", why)
    return Move(weight, target, forms, _how(weight, target), why)


def _how(weight: StoredWeight, target: NumberFormat) -> How:
    """How numbers change; where they do not, or are only cast, how experts do."""
    assert weight.format is not None
    if not weight.format.is_plain:
        return "dequantised" if target.is_plain else "requantised"
    if not target.is_plain:
        return "quantised"
    if weight.cut is not None:
        return "split"
    return "stacked" if weight.pieces else "cast"


def moment_move(weight: StoredWeight, wanted: Wanted) -> Move:
    """An optimizer's state, which is copied as it is; a native run's files call it as the weight."""
    ((name, entry),) = weight.parts.items()
    form = (entry.dtype, entry.shape)
    forms = {weight.name if wanted.layout == "dcp" else name: form}
    return Move(weight, weight.format, forms, "copied", "state of the optimizer")


def _forms(weight: StoredWeight, target: NumberFormat | None) -> dict[str, Form]:
    assert target is not None
    return stored_forms(target, weight.name, weight.shape)


def _same(
    weight: StoredWeight, target: NumberFormat, held: Mapping[str, Form], forms: Mapping[str, Form]
) -> bool:
    """Whether the weight is stored as it will be; the type of its scales may be the publisher's."""
    if weight.format != target or (target.name == "fp8" and weight.block != FP8_BLOCK):
        return False
    return {name: form[1] for name, form in held.items()} == {name: form[1] for name, form in forms.items()}


def _unfit(weight: StoredWeight, target: NumberFormat | None) -> str:
    if target is None or target.is_plain:
        return ""
    if target.group and weight.shape[1] % target.group:
        return f"rows of {weight.shape[1]} weights cannot be cut into {target.name} groups of {target.group}"
    return ""
