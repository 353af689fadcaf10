"""Bytes of a model's weights as a precision policy stores them: in an engine, in transit, in a checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass

from miles.arch import ArchSpec, published_tensors
from miles.arch.precision import PrecisionPolicy
from miles.arch.safetensors_header import DTYPE_BITS
from miles.arch.stored_forms import has_layout, stored_forms


@dataclass(frozen=True)
class StoredBytes:
    """Counts of weights and bytes, of those that are quantised and of the rest."""

    quantised: int
    quantised_bytes: int
    """With scales, and whatever else the format stores."""
    plain: int
    plain_bytes: int

    @property
    def total(self) -> int:
        return self.quantised_bytes + self.plain_bytes


def stored_bytes(spec: ArchSpec, policy: PrecisionPolicy) -> StoredBytes | None:
    """What every published tensor of the model takes, to the byte; None where one has no layout."""
    quantised = quantised_bytes = plain = plain_bytes = 0
    for name, shape in published_tensors(policy.layout(spec)).items():
        target, numbers = policy.storage(name), math.prod(shape)
        if not has_layout(target, shape):
            return None
        forms = stored_forms(target, name, shape).values()
        size = sum(math.prod(held) * DTYPE_BITS[code] // 8 for code, held in forms)
        if target.is_plain:
            plain, plain_bytes = plain + numbers, plain_bytes + size
        else:
            quantised, quantised_bytes = quantised + numbers, quantised_bytes + size
    return StoredBytes(quantised, quantised_bytes, plain, plain_bytes)
