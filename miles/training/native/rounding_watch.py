"""Measures, layer by layer, what the number format of a run does to its weights and activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from miles.models.decoder import Decoder
from miles.models.projections import Projections
from miles.precision.fake_operands import FakeOperands
from miles.precision.rounding_sums import COUNT, shares

KINDS = ("weight", "activation")


class RoundingWatch:
    """The rounded matrices of a decoder's layers. `measure` before a forward, `metrics` after it.

    layers: those of this rank by layer; every rank names the same layers, with nothing in some.
    """

    def __init__(self, layers: Mapping[int, Sequence[FakeOperands]]) -> None:
        self._layers = layers

    def measure(self) -> None:
        """Measure the next forward: all weights, and the activations of its first product with each."""
        for operands in self._all():
            operands.measure()

    def metrics(self, over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """`precision/…` of each layer and of all together; what was not measured is absent.

        over_ranks: the sum over all ranks, a collective.
        """
        sums = over_ranks(self._sums())
        metrics = {}
        for kind, of_kind in zip(KINDS, sums.unbind(1), strict=True):
            for name, share in shares(of_kind.sum(0)).items():
                metrics[f"precision/{kind}_{name}"] = share
            for layer, of_layer in zip(self._layers, of_kind, strict=True):
                for name, share in shares(of_layer).items():
                    metrics[f"precision/{kind}_{name}/layer_{layer}"] = share
        return metrics

    def _sums(self) -> Tensor:
        """fp64 [layers, kinds, 6] of this rank."""
        sums = torch.zeros(len(self._layers), len(KINDS), COUNT, dtype=torch.float64)
        for row, operands in zip(sums, self._layers.values(), strict=True):
            for each in operands:
                for total, part in zip(row, (each.weight_sums, each.activation_sums), strict=True):
                    if part is not None:
                        total += part.cpu()
        return sums

    def _all(self) -> Iterator[FakeOperands]:
        for operands in self._layers.values():
            yield from operands


def rounded_layers(decoder: Decoder) -> dict[int, list[FakeOperands]]:
    """What a trainer's decoder rounds, by layer; layers without any are left out."""
    found = {index: list(_operands(layer)) for index, layer in enumerate(decoder.layers)}
    return {index: operands for index, operands in found.items() if operands}


def _operands(layer: torch.nn.Module) -> Iterator[FakeOperands]:
    for block in layer.modules():
        if isinstance(block, Projections):
            for operands in block.operands.values():
                assert isinstance(operands, FakeOperands), "a trainer's operands"
                yield operands
