"""Which weights a checkpoint holds, and in which number format each of them is stored.

Read from headers and config.json alone; the two must agree. Layouts: block FP8 and MXFP8 as DeepSeek, Qwen
and SGLang publish them, compressed-tensors (`float-quantized`, `int-quantized`, `pack-quantized`,
`nvfp4-pack-quantized`), NVFP4 and FP8 of ModelOpt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from miles.arch.expert_layout import Cut
from miles.arch.family import Shape
from miles.arch.precision import NumberFormat
from miles.arch.quantization_config import QuantisationTable, read_quantization_config
from miles.arch.safetensors_header import TensorEntry
from miles.arch.stored_forms import PLAIN_CODES
from miles.errors import CheckpointError

PARTS = ("_scale_inv", "_scale_2", "_scale", "_shape", "_zero_point", "_packed", "_global_scale", "_g_idx")
"""What stands behind the name of a weight in the names of the tensors that store it."""
ACTIVATION_SCALES = (".input_scale", ".k_scale", ".v_scale", ".output_scale", ".input_global_scale")
QUANTISED_CODES = ("F8_E4M3", "I8", "U8")
_PLAIN = {code: name for name, code in PLAIN_CODES.items()}
_LISTED = 5


@dataclass(frozen=True)
class StoredWeight:
    """One weight: the name under which it is published, and the tensors that stand for it."""

    name: str
    shape: Shape
    format: NumberFormat | None
    """None: whole numbers or booleans, which no number format applies to."""
    parts: Mapping[str, TensorEntry]
    """By their names in the checkpoint."""
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale, of `fp8`."""
    cut: Cut | None = None
    """Of a matrix that lies in a stacked tensor, its only part: where."""
    pieces: tuple[tuple[Cut, StoredWeight], ...] = ()
    """Of a stacked tensor that is stored as the matrices inside: each of them."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that stand for it, of one cut out of a tensor its own."""
        whole = sum(entry.nbytes for entry in self.parts.values())
        if self.cut is None:
            return whole
        return whole * prod(self.shape) // sum(entry.numel for entry in self.parts.values())

    def part(self, *suffixes: str) -> str | None:
        """The name of the part that ends in one of these, if there is one."""
        return next((self.name + s for s in suffixes if self.name + s in self.parts), None)


@dataclass(frozen=True)
class StoredWeights:
    """Every tensor of a checkpoint is either a part of one of `weights` or `left_out` for a reason."""

    weights: Mapping[str, StoredWeight]
    left_out: Mapping[str, str]


def stored_weights(
    entries: Mapping[str, TensorEntry],
    config: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    where: str,
) -> StoredWeights:
    """Group the tensors of a checkpoint by the weights that they stand for, in the order of `entries`.

    Args:
        shapes: the shapes that config.json gives; packed rows do not tell their own length.

    Raises CheckpointError naming the tensors where a layout is unknown or contradicts config.json.
    """
    table = read_quantization_config(config, where)
    left_out = {
        name: "scale of activations: an engine computes its own"
        for name in entries
        if name.endswith(ACTIVATION_SCALES)
    }
    found: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        if name not in left_out:
            found.setdefault(_weight_of(name, entries), {})[name] = entry
    weights: dict[str, StoredWeight] = {}
    problems: dict[str, list[str]] = {}
    for name, parts in found.items():
        weight = _stored_weight(name, parts, table, shapes)
        if isinstance(weight, str):
            problems.setdefault(weight, []).append(name)
        else:
            weights[name] = weight
    _check(weights, problems, table, where)
    return StoredWeights(weights, left_out)


def _weight_of(name: str, entries: Mapping[str, TensorEntry]) -> str:
    """The weight that a tensor belongs to: another one's name where this is a scale or the like."""
    for suffix in PARTS:
        base = name.removesuffix(suffix)
        if base != name and (suffix == "_packed" or base in entries or f"{base}_packed" in entries):
            return base
    return name


def _stored_weight(
    name: str, parts: dict[str, TensorEntry], table: QuantisationTable | None, shapes: Mapping[str, Shape]
) -> StoredWeight | str:
    """The weight, or what is wrong with it."""
    values = parts.get(name)
    if len(parts) == 1 and values is not None and values.dtype not in QUANTISED_CODES:
        plain = _PLAIN.get(values.dtype)
        return StoredWeight(name, values.shape, NumberFormat(plain) if plain else None, parts)
    if table is None:
        return "quantised, but config.json has no quantization_config"
    if f"{name}_g_idx" in parts:
        return "reordered by activations (g_idx), which is not read"
    if values is None:
        return _packed(name, parts, shapes)
    if len(values.shape) != 2:
        return f"quantised with {len(values.shape)} dimensions; only matrices are read"
    if values.dtype == "U8":
        return _nvfp4(name, parts, values, f"{name}_scale_2")
    if values.dtype == "I8":
        return _int8(name, parts, values)
    return _fp8(name, parts, values, table) if values.dtype == "F8_E4M3" else f"{values.dtype} beside scales"


def _packed(name: str, parts: dict[str, TensorEntry], shapes: Mapping[str, Shape]) -> StoredWeight | str:
    packed, scale = parts[f"{name}_packed"], parts.get(f"{name}_scale")
    if scale is None or len(packed.shape) != 2 or len(scale.shape) != 2:
        return "packed without a matrix of scales"
    if packed.dtype == "U8":
        return _nvfp4(name, parts, packed, f"{name}_global_scale")
    shape = shapes.get(name, (packed.shape[0], packed.shape[1] * 8))
    if packed.dtype != "I32" or packed.shape != (shape[0], -(-shape[1] // 8)):
        return f"packed as {packed.dtype} {list(packed.shape)}, which is not INT4 of {list(shape)}"
    if f"{name}_shape" not in parts or shape[1] % scale.shape[1]:
        return f"INT4 of {list(shape)} with scales {list(scale.shape)}, or without its shape"
    symmetric = f"{name}_zero_point" not in parts
    stored = NumberFormat("int4", group_size=shape[1] // scale.shape[1], symmetric=symmetric)
    return StoredWeight(name, shape, stored, parts)


def _nvfp4(name: str, parts: dict[str, TensorEntry], values: TensorEntry, outer: str) -> StoredWeight | str:
    rows, columns = values.shape[0], values.shape[1] * 2
    scale = parts.get(f"{name}_scale")
    if scale is None or outer not in parts or scale.shape != (rows, columns // 16):
        return f"U8 {list(values.shape)} without the scales of NVFP4"
    return StoredWeight(name, (rows, columns), NumberFormat("nvfp4"), parts)


def _int8(name: str, parts: dict[str, TensorEntry], values: TensorEntry) -> StoredWeight | str:
    scale = parts.get(f"{name}_scale")
    if len(parts) != 2 or scale is None or scale.numel != values.shape[0]:
        return "I8 without one scale for each row; other INT8 layouts are not read"
    return StoredWeight(name, values.shape, NumberFormat("int8"), parts)


def _fp8(
    name: str, parts: dict[str, TensorEntry], values: TensorEntry, table: QuantisationTable
) -> StoredWeight | str:
    scale = parts.get(f"{name}_scale_inv") or parts.get(f"{name}_scale")
    if scale is None or len(parts) != 2:
        return "F8_E4M3 without its scales"
    (rows, columns), block = values.shape, table.block
    if scale.dtype in ("U8", "F8_E8M0") and scale.shape == (rows, columns // 32):
        return StoredWeight(name, values.shape, NumberFormat("mxfp8"), parts)
    if block and scale.shape == (-(-rows // block[0]), -(-columns // block[1])):
        return StoredWeight(name, values.shape, NumberFormat("fp8", table.scales), parts, block)
    if scale.numel == 1:
        return StoredWeight(name, values.shape, NumberFormat("fp8_tensor"), parts)
    if scale.numel == rows and scale.shape[0] == rows:
        return StoredWeight(name, values.shape, NumberFormat("fp8_channel"), parts)
    return f"F8_E4M3 {list(values.shape)} with scales {list(scale.shape)}, which config.json does not explain"


def _check(
    weights: Mapping[str, StoredWeight],
    problems: dict[str, list[str]],
    table: QuantisationTable | None,
    where: str,
) -> None:
    """Raise for weights that cannot be read, and where config.json says another format than the weights."""
    quantised = [w for w in weights.values() if w.format is not None and not w.format.is_plain]
    if table is not None:
        if others := [w.name for w in quantised if w.format and w.format.name not in table.formats]:
            problems[f"not in the format that config.json names ({table.name})"] = others
        if not quantised and not problems:
            problems[f"plain, but config.json says {table.name}"] = list(weights)
    if problems:
        told = "; ".join(f"{what}: {_listed(names)}" for what, names in problems.items())
        raise CheckpointError(
            f"weights do not match config.json: {told}",
            where=where,
            fix="use the config.json that was published with these weights",
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
