"""Which activations the native trainer computes again in backward instead of keeping them."""

from __future__ import annotations

from dataclasses import dataclass

from miles.config import RunConfig


@dataclass(frozen=True)
class Recompute:
    """`layers`: the first so many keep only their input. `modules`: of every layer, these are not kept."""

    layers: int = 0
    modules: tuple[str, ...] = ()


def plan_recompute(config: RunConfig, num_layers: int) -> Recompute:
    """As set; `full` means every layer unless it is to be a block of the first ones."""
    training = config.training
    if training.recompute_granularity == "selective":
        return Recompute(modules=tuple(training.recompute_modules or ("core_attn",)))
    if training.recompute_granularity != "full":
        return Recompute()
    if training.recompute_method == "block" and training.recompute_num_layers is not None:
        return Recompute(layers=min(training.recompute_num_layers, num_layers))
    return Recompute(layers=num_layers)
