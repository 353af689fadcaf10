"""A precision policy on the native decoder: which parameters are rounded, in which format, and of which
published matrices they are made. Trainer (`fake_quantise`) and engine (`held_weights`) read this one map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from miles.arch.expert_layout import is_stack, with_split_experts
from miles.arch.precision import NumberFormat, PrecisionPolicy
from miles.errors import ConfigError, MilesError
from miles.models.projections import Projections
from miles.precision.fake_operands import FakeOperands
from miles.precision.weight_format import published, quantised, rounded
from miles.weights.native_map import DRAFT, views_with_origin
from miles.weights.stacked_experts import split_stack

NATIVE_FORMATS = ("fp8", "mxfp8", "int4")
"""Quantised formats that the native decoder multiplies in."""


@dataclass(frozen=True)
class Rounded:
    """A native parameter that is rounded; `pieces`: rows of its published matrices, in their order."""

    target: NumberFormat
    pieces: Mapping[str, int]


def fake_quantise(policy: PrecisionPolicy, decoder: nn.Module, draft: nn.Module | None = None) -> None:
    """Let a trainer's decoder, and its MTP layers, multiply what the policy says from now on."""
    for name, parameter in rounded_parameters(policy.compute, decoder, draft).items():
        block, attribute = owner_of(name, decoder, draft)
        block.operands[attribute] = FakeOperands(parameter.target, tuple(parameter.pieces.values()))


def as_stored(weights: Iterable[tuple[str, Tensor]], policy: PrecisionPolicy) -> Iterator[tuple[str, Tensor]]:
    """Weights under published names as they travel to an engine of this policy, and as a checkpoint holds
    them: quantised ones in the tensors of their format, stacked experts one by one where any is quantised.
    """
    for name, tensor in _as_laid_out(weights, policy):
        target = policy.storage(name)
        if target.is_plain:
            yield name, rounded(policy, name, tensor)
        else:
            yield from published(name, quantised(target, tensor)).items()


def _as_laid_out(
    weights: Iterable[tuple[str, Tensor]], policy: PrecisionPolicy
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        if policy.splits_experts and is_stack(name):
            yield from split_stack(name, tensor)
        else:
            yield name, tensor


def rounded_parameters(
    form: Callable[[str], NumberFormat], decoder: nn.Module, draft: nn.Module | None
) -> dict[str, Rounded]:
    """The quantised parameters of both, under native names.

    Raises ConfigError where a fused one would have two formats, which no single product has, and for a format
    that the decoder does not multiply in.
    """
    found = {}
    spec, shapes = (decoder if draft is None else draft).spec, native_shapes(decoder, draft)
    if spec.moe is not None and spec.moe.stacked:
        spec = with_split_experts(spec)
        shapes = {name: shape.mT if shape.ndim == 3 else shape for name, shape in shapes.items()}
    views = views_with_origin(spec, shapes)
    for origin, group in groupby(views, key=lambda view: view[0]):
        pieces = {name: view.shape[0] for _, name, view in group}
        target = one_format(list(pieces), form)
        if target is None:
            continue
        assert target.name in NATIVE_FORMATS, f"preflight refuses {target}"
        found[origin] = Rounded(target, pieces)
    return found


def one_format(names: Sequence[str], form: Callable[[str], NumberFormat]) -> NumberFormat | None:
    """The quantised format of weights that are multiplied as one matrix; None where they are plain.

    Raises ConfigError where they have two formats, which no product has.
    """
    formats = {form(name) for name in names}
    target = next((f for f in formats if not f.is_plain), None)
    if target is not None and len(formats) > 1:
        raise ConfigError(_split(names, form))
    return target


def _split(names: Sequence[str], form: Callable[[str], NumberFormat]) -> MilesError:
    kept = next(name for name in names if form(name).is_plain)
    other = next(name for name in names if not form(name).is_plain)
    return MilesError(
        f"{kept} is kept plain, {other} is quantised",
        where="precision.extra_high_precision_layers_hf",
        why="they are multiplied as one matrix, which has one format",
        fix="name all of them, or none",
    )


def owner_of(name: str, decoder: nn.Module, draft: nn.Module | None) -> tuple[Projections, str]:
    """The block that has a parameter, and what it calls it."""
    root, path = (draft, name.removeprefix(DRAFT)) if name.startswith(DRAFT) else (decoder, name)
    assert root is not None
    module, _, attribute = path.rpartition(".")
    block = root.get_submodule(module)
    assert isinstance(block, Projections), f"{name} is multiplied outside Projections"
    return block, attribute


def native_shapes(decoder: nn.Module, draft: nn.Module | None) -> dict[str, Tensor]:
    """Shapes of all parameters under native names."""
    named = dict(decoder.named_parameters())
    if draft is not None:
        named |= {DRAFT + name: parameter for name, parameter in draft.named_parameters()}
    return {name: torch.empty(parameter.shape, device="meta") for name, parameter in named.items()}
