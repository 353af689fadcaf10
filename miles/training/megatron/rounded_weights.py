"""INT4 QAT in Megatron's own modules: their forward multiplies the weights as an engine holds them.

While the forward of a module runs, rounded tensors stand in the place of its parameters; names, gradients,
optimizer and checkpoints are those of the plain ones. Megatron's linear layers, which call theirs `weight`,
and the grouped ones of Transformer Engine (`weight0`, `weight1`, ... one an expert) are treated alike. FP8 is
Transformer Engine's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from miles.arch.precision import PrecisionPolicy
from miles.arch.tensor_roles import decoder_layer
from miles.precision.fake_operands import FakeOperands
from miles.training.megatron.pieces import Place
from miles.training.settings import TrainerSettings
from miles.weights.low_precision import one_format

RoundedLayers = dict[int, list[FakeOperands]]
"""What is rounded in each decoder layer of this rank; MTP layers are left out."""


def int4_policy(settings: TrainerSettings) -> PrecisionPolicy | None:
    """The run's precision policy under INT4 QAT, else None."""
    policy = settings.precision
    return policy if policy is not None and policy.training.name == "int4" else None


def fake_quantise(policy: PrecisionPolicy | None, module: nn.Module, found: Iterable[Place]) -> RoundedLayers:
    """Let `module`, whose parameters have these places, multiply what the policy says from now on.

    A range of columns, as tensor parallelism cuts it, is whole groups, or its first forward raises
    ConfigError (preflight: I43).
    """
    layers: RoundedLayers = {}
    if policy is None:
        return layers
    operands: dict[str, dict[str, FakeOperands]] = {}
    for place in found:
        names = [piece.name for piece in place.pieces]
        target = one_format(names, policy.compute)
        if target is None:
            continue
        # Groups lie within a row, wherever a piece's rows are.
        rounded = FakeOperands(target, (len(module.get_parameter(place.parameter)),))
        owner, _, attribute = place.parameter.rpartition(".")
        operands.setdefault(owner, {})[attribute] = rounded
        layer = decoder_layer(names[0])
        if layer is not None and layer < policy.num_layers:
            layers.setdefault(layer, []).append(rounded)
    for owner, of_owner in operands.items():
        _round_in_forward(module.get_submodule(owner), of_owner)
    return layers


def _round_in_forward(module: nn.Module, operands: Mapping[str, FakeOperands]) -> None:
    plain_forward = module.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        held: dict[str, Any] = module._parameters
        own = {name: held[name] for name in operands}
        held.update({name: operands[name].weight(weight) for name, weight in own.items()})
        try:
            return plain_forward(*arguments, **options)
        finally:
            held.update(own)

    setattr(module, "forward", forward)  # noqa: B010


def over_all_ranks(sums: Tensor) -> Tensor:
    """Sums over every process: a rank has its stages' layers, its experts and its columns of them."""
    if dist.get_world_size() == 1:
        return sums
    # NCCL reduces what lies on a GPU only.
    total = sums.to("cuda" if dist.get_backend() == "nccl" else sums.device, copy=True)
    dist.all_reduce(total)
    return total.to(sums.device)
