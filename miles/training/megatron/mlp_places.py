"""The parameters of a layer's MLP, dense or with experts, as pieces of published tensors.

Legend: H hidden size, I width of an expert.
"""

from __future__ import annotations

import re

from torch import Tensor

from miles.arch.family import MOE_NAMES, MoeNames
from miles.arch.spec import DenseMlpSpec, MoeSpec
from miles.training.megatron.pieces import Piece, Place, Shard, columns, replicated


def mlp_place(
    name: str,
    local: str,
    prefix: str,
    mlp: DenseMlpSpec | MoeSpec,
    parameter: Tensor,
    shard: Shard,
    names: MoeNames,
) -> Place:
    """The place of parameter `local` of a layer, which begins with `mlp.`."""
    matrix = local.split(".")[-2]
    if isinstance(mlp, DenseMlpSpec):
        block = f"{prefix}.{names.dense_block}"
        return Place(name, _mlp(block, matrix, parameter, shard.tp, MOE_NAMES), shard.writes_dense)
    block = f"{prefix}.{names.block}"
    if local == "mlp.router.weight":
        return replicated(name, f"{block}.{names.router}", parameter, shard)
    if local == "mlp.router.expert_bias":
        return replicated(name, f"{block}.{names.correction_bias}", parameter, shard)
    if local.startswith("mlp.shared_experts."):
        block = f"{block}.{names.shared}"
        return Place(name, _mlp(block, matrix, parameter, shard.tp, MOE_NAMES), shard.writes_dense)
    expert = _expert(local)
    assert expert is not None, f"no place for {name}"
    matrix, number = expert
    number += shard.ep * mlp.num_experts // shard.ep_size
    if mlp.stacked:
        pieces = _in_stack(f"{block}.experts", number, matrix, parameter, mlp, shard.etp)
    else:
        pieces = _mlp(f"{block}.experts.{number}", matrix, parameter, shard.etp, names)
    return Place(name, pieces, shard.writes_experts)


def _mlp(prefix: str, matrix: str, parameter: Tensor, rank: int, names: MoeNames) -> tuple[Piece, ...]:
    """linear_fc1 is this rank's rows of gate over those of up; linear_fc2 its columns of down."""
    if matrix == "linear_fc2":
        return (columns(f"{prefix}.{names.down}.weight", parameter, rank),)
    rows = parameter.shape[0] // 2
    return (
        Piece(f"{prefix}.{names.gate}.weight", 0, rank * rows, rows, lambda local: local[:rows]),
        Piece(f"{prefix}.{names.up}.weight", 0, rank * rows, rows, lambda local: local[rows:]),
    )


def _in_stack(
    prefix: str, number: int, matrix: str, parameter: Tensor, moe: MoeSpec, rank: int
) -> tuple[Piece, ...]:
    """One expert of gate_up_proj [experts, H, 2I] or down_proj [experts, I, H], which Megatron transposes."""
    if matrix == "linear_fc2":
        width = parameter.shape[1]
        own = (1, rank * width, width)
        return (Piece(f"{prefix}.down_proj", 0, number, 1, lambda local: local.t()[None], own),)
    width = parameter.shape[0] // 2
    gate, up = ((2, half * moe.intermediate_size + rank * width, width) for half in (0, 1))
    name = f"{prefix}.gate_up_proj"
    return (
        Piece(name, 0, number, 1, lambda local: local[:width].t()[None], gate),
        Piece(name, 0, number, 1, lambda local: local[width:].t()[None], up),
    )


def _expert(local: str) -> tuple[str, int] | None:
    """(matrix, number among this rank's experts): Megatron's sequential experts and Transformer Engine's."""
    match = re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight", local)
    if match:
        return match[2], int(match[1])
    match = re.fullmatch(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)", local)
    return (match[1], int(match[2])) if match else None
