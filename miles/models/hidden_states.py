"""What a decoder computed on the way, stage by stage, and where two runs over the same tokens part.

Stages in order: "embedding", then for every layer "layer 0 attention" and "layer 0 mlp" (the blocks' outputs
before the residual sums, router and experts included) and "layer 0" (the sum of all), and "final norm".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miles.models.decoder import Decoder

Stages = dict[str, Tensor]
"""Stage -> [T, D]."""


@dataclass(frozen=True)
class Difference:
    """The first stage, and in it the first token, at which two runs differ."""

    stage: str
    layer: int | None
    """None before and after the layers."""
    token: int
    elements: int
    """Elements of the stage that differ, over all tokens."""
    max_abs: float

    @property
    def module(self) -> str | None:
        """Inside the layer: "attention", "mlp", or "sum" for what the residual stream adds to them."""
        return None if self.layer is None else (self.stage.split()[2:] or ["sum"])[0]


@contextmanager
def hidden_states(decoder: Decoder) -> Iterator[dict[str, list[Tensor]]]:
    """Collects the stages of every forward inside the block, one list entry per forward."""
    seen: dict[str, list[Tensor]] = {}

    def keep(stage: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            seen.setdefault(stage, []).append(output.detach().clone())

        return hook

    def keep_embedding(module: Any, inputs: tuple[Tensor, ...]) -> None:
        seen.setdefault("embedding", []).append(inputs[0].detach().clone())

    handles = [decoder.layers[0].register_forward_pre_hook(keep_embedding)]
    for index, layer in enumerate(decoder.layers):
        handles.append(layer.attention.register_forward_hook(keep(f"layer {index} attention")))
        handles.append(layer.mlp.register_forward_hook(keep(f"layer {index} mlp")))
        handles.append(layer.register_forward_hook(keep(f"layer {index}")))
    handles.append(decoder.register_forward_hook(keep("final norm")))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def joined(seen: dict[str, list[Tensor]]) -> Stages:
    """The stages of consecutive forwards over one sequence as if it had been one."""
    return {stage: torch.cat(parts) for stage, parts in seen.items()}


def first_difference(one: Stages, other: Stages) -> Difference | None:
    """None when every stage has the same bits on both sides."""
    for stage in _in_order(one):
        differs = one[stage] != other[stage]
        if not differs.any():
            continue
        layer = int(stage.split()[1]) if stage.startswith("layer") else None
        gap = (one[stage].float() - other[stage].float()).abs().max()
        return Difference(stage, layer, int(differs.any(-1).nonzero()[0]), int(differs.sum()), float(gap))
    return None


def stage_names(num_layers: int) -> list[str]:
    """All stages in the order in which they are computed."""
    layers = (f"layer {i}{block}" for i in range(num_layers) for block in (" attention", " mlp", ""))
    return ["embedding", *layers, "final norm"]


def _in_order(stages: Stages) -> list[str]:
    layers = sorted((s for s in stages if s.startswith("layer")), key=_place)
    return ["embedding", *layers, "final norm"]


def _place(stage: str) -> tuple[int, int]:
    """A layer's blocks come before the layer as a whole."""
    _, index, *block = stage.split()
    return int(index), ("attention", "mlp", "").index("".join(block))
