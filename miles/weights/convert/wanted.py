"""What a conversion is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from miles.arch import ArchSpec, Dtype
from miles.arch.precision import NumberFormat, PrecisionPolicy, precision_policy
from miles.arch.stored_weights import StoredWeight
from miles.arch.tensor_roles import is_fp32_buffer
from miles.weights.hf import MAX_SHARD_BYTES

Layout = Literal["hf", "dcp", "native"]
"""Safetensors as Hugging Face publishes them, torch's distributed checkpoint, or a step of a native run."""


@dataclass(frozen=True)
class Wanted:
    """The target of a conversion: its number formats, exceptions, MTP layers and files."""

    format: NumberFormat | None = None
    """None: every tensor stays as it is, which `dcp` allows for plain numbers only."""
    plain: Dtype | None = None
    """Of tensors that a quantised format leaves alone, and of all in `dcp`; None: as in the source."""
    first_layers: int = 0
    last_layers: int = 0
    kept: tuple[str, ...] = ()
    """Exceptions of the precision policy: decoder layers at both ends, and names or parts of them."""
    mtp_num_layers: int | None = None
    """None: those of the source."""
    seed: int = 0
    """Of fresh MTP layers."""
    layout: Layout = "hf"
    optimizer: bool = True
    """Whether a step's optimizer state goes along, where the layout has a place for it."""
    max_shard_bytes: int = MAX_SHARD_BYTES

    @property
    def is_quantised(self) -> bool:
        return self.format is not None and not self.format.is_plain

    def policy(self, spec: ArchSpec) -> PrecisionPolicy | None:
        """The precision policy of the target; None where every tensor stays as it is."""
        if self.format is None:
            return None
        return precision_policy(
            spec,
            self.plain or spec.dtype,
            self.format,
            first_layers=self.first_layers,
            last_layers=self.last_layers,
            kept=self.kept,
        )

    def format_of(
        self, weight: StoredWeight, policy: PrecisionPolicy | None, spec: ArchSpec
    ) -> NumberFormat | None:
        """The format in which a weight is written; None for numbers that no format applies to."""
        held = weight.format
        if held is None:
            return None
        if policy is None:
            if self.layout != "dcp" or (held.is_plain and self.plain is None):
                return held
            return NumberFormat(self.plain or spec.dtype)
        stored = policy.storage(weight.name)
        if not stored.is_plain:
            return stored
        if is_fp32_buffer(weight.name) and held.is_plain:
            return held
        if self.is_quantised and self.plain is None and held.is_plain:
            return held
        return stored
