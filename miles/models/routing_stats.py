"""How far two sets of routes agree, as counts that add up over micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingAgreement:
    """Counts over rows (tokens) with a recorded route. A row flips in a layer if its expert *set* differs."""

    rows: int
    flips_per_layer: tuple[int, ...]
    any_flip: int
    """Rows that flip in at least one layer."""
    zero_overlap: int
    """Pairs of row and layer of which no recorded expert would be chosen again."""
    dispatched_flips: int
    """Pairs of row and layer that were really sent to another expert set; none where all is replayed."""

    def __add__(self, other: RoutingAgreement) -> RoutingAgreement:
        flips = zip(self.flips_per_layer, other.flips_per_layer, strict=True)
        return RoutingAgreement(
            rows=self.rows + other.rows,
            flips_per_layer=tuple(a + b for a, b in flips),
            any_flip=self.any_flip + other.any_flip,
            zero_overlap=self.zero_overlap + other.zero_overlap,
            dispatched_flips=self.dispatched_flips + other.dispatched_flips,
        )

    @property
    def flip_rates(self) -> tuple[float, ...]:
        """Per MoE layer, the fraction of rows that flip. Only defined when `rows` is not 0."""
        return tuple(flips / self.rows for flips in self.flips_per_layer)

    @property
    def any_flip_fraction(self) -> float:
        return self.any_flip / self.rows

    @property
    def zero_overlap_fraction(self) -> float:
        return self.zero_overlap / (self.rows * len(self.flips_per_layer))

    @property
    def dispatched_flip_fraction(self) -> float:
        return self.dispatched_flips / (self.rows * len(self.flips_per_layer))


class PassRoutes(Protocol):
    """What one forward routed, and how that agrees with the routes it was compared with."""

    @property
    def dispatched(self) -> Mapping[int, Tensor]:
        """Expert ids int64 [T, k] by MoE layer."""

    @property
    def measures(self) -> bool:
        """Whether this pass was compared with recorded routes."""

    def agreement(self, copies: Tensor | None = None) -> RoutingAgreement:
        """Summed over the pass. `copies` (int64 [T]): how many rows each token stands for; by default one."""

    def flipped_rows(self) -> Tensor:
        """bool [T]: rows that would be routed otherwise in at least one layer."""


def compare_routes(decided: Tensor, recorded: Tensor) -> tuple[Tensor, Tensor]:
    """Compare expert sets row by row; rows recorded as -1 count as equal.

    Args:
        decided, recorded: int64 [T, k], ids distinct within a row.

    Returns:
        flipped, disjoint: bool [T].
    """
    if decided.device.type == "cpu" and torch.equal(decided, recorded):
        # As most often in one precision. Elsewhere this look would wait for the device.
        nowhere = torch.zeros(len(decided), dtype=torch.bool)
        return nowhere, nowhere
    same = decided.unsqueeze(-1) == recorded.unsqueeze(-2)
    common = same.flatten(1).sum(-1)
    known = recorded[:, 0] >= 0
    return known & (common < decided.shape[-1]), known & (common == 0)
