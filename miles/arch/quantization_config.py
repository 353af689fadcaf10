"""`quantization_config` of a published checkpoint's config.json: what a reader needs to know of the policy.

Block FP8 and MXFP8 are written as DeepSeek, Qwen and SGLang do, FP8 by row or tensor and integers as
compressed-tensors does, NVFP4 as ModelOpt does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miles.arch.family import Shape
from miles.arch.precision import FormatName, NumberFormat, PrecisionPolicy, ScaleFormat
from miles.errors import CheckpointError

KEYS = ("quantization_config", "compression_config")
"""Where config.json says how weights are quantised; the first is the one we write."""

_EXPERTS = re.compile(r"^(.+\.experts)\.")


def quantization_config(policy: PrecisionPolicy, shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """The table for a checkpoint stored as the policy says; None for plain numbers.

    shapes: every published tensor. Modules with a matrix that stays plain are listed, so that a reader does
    not look for their scales; experts that all stay plain are listed as one.
    """
    stored = policy.rollout
    if stored.is_plain:
        return None
    kept = kept_modules(policy, shapes)
    if stored.name in ("fp8", "mxfp8"):
        return _fine_grained(stored) | {"modules_to_not_convert": kept}
    if stored.name == "nvfp4":
        return _modelopt() | {"ignore": _with_patterns(kept)}
    return _compressed_tensors(stored) | {"ignore": _with_patterns(kept)}


def kept_modules(policy: PrecisionPolicy, shapes: Mapping[str, Shape]) -> list[str]:
    """Modules whose matrices stay plain, in the checkpoint's order; all experts of a layer are one."""
    plain = {name for name, shape in shapes.items() if len(shape) > 1 and policy.storage(name).is_plain}
    mixed = {_experts(name) for name in shapes if name not in plain}
    modules = [
        name.removesuffix(".weight") if _experts(name) is None or _experts(name) in mixed else _experts(name)
        for name in shapes
        if name in plain
    ]
    return [module for module in dict.fromkeys(modules) if module is not None]


def _experts(name: str) -> str | None:
    """The module that holds all experts of a layer."""
    found = _EXPERTS.match(name)
    return found[1] if found else None


def _with_patterns(modules: list[str]) -> list[str]:
    """compressed-tensors and ModelOpt match whole names; a container's parts need a pattern."""
    return [f"re:{re.escape(m)}\\..*" if m.endswith(".experts") else m for m in modules]


def _fine_grained(stored: NumberFormat) -> dict[str, Any]:
    micro = stored.name == "mxfp8"
    table = {
        "quant_method": stored.name,
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, 32] if micro else [128, 128],
    }
    return table | ({"scale_fmt": "ue8m0"} if micro or stored.scales == "pow2" else {})


def _compressed_tensors(stored: NumberFormat) -> dict[str, Any]:
    dynamic = {"strategy": "token", "dynamic": True, "symmetric": True}
    if stored.name == "int4":
        kind, weights, activations = "pack-quantized", {"num_bits": 4, "type": "int"}, None
        weights |= {"strategy": "group", "group_size": stored.group_size, "symmetric": stored.symmetric}
    elif stored.name == "int8":
        bits = {"num_bits": 8, "type": "int"}
        kind, weights, activations = "int-quantized", bits | {"strategy": "channel"}, bits | dynamic
    else:
        bits, extent = {"num_bits": 8, "type": "float"}, stored.name.removeprefix("fp8_")
        kind, weights, activations = "float-quantized", bits | {"strategy": extent}, bits | dynamic
    group = {
        "targets": ["Linear"],
        "weights": {"symmetric": True, "dynamic": False} | weights,
        "input_activations": activations,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    }


def _modelopt() -> dict[str, Any]:
    e2m1 = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}
    group = {"targets": ["Linear"], "weights": e2m1, "input_activations": e2m1 | {"dynamic": True}}
    return {"quant_method": "modelopt", "quant_algo": "NVFP4", "config_groups": {"group_0": group}}


@dataclass(frozen=True)
class QuantisationTable:
    """What a checkpoint's table says of its weights."""

    name: str
    """The method, and the layout where it has several, for messages."""
    formats: tuple[FormatName, ...]
    """Those that weights of this method are stored in."""
    block: tuple[int, int] | None = None
    scales: ScaleFormat = "fp32"


_FP8: tuple[FormatName, ...] = ("fp8", "fp8_channel", "fp8_tensor")


def read_quantization_config(config: Mapping[str, Any], where: str) -> QuantisationTable | None:
    """The table of a config.json; None for plain numbers. Raises CheckpointError for an unknown method."""
    table = next((config[key] for key in KEYS if isinstance(config.get(key), dict)), None)
    if table is None:
        return None
    method = str(table.get("quant_method", "")).lower()
    if method in ("fp8", "mxfp8"):
        scales: ScaleFormat = "pow2" if str(table.get("scale_fmt", "")).lower() == "ue8m0" else "fp32"
        formats = ("mxfp8",) if method == "mxfp8" else _FP8
        return QuantisationTable(method, formats, _block(table.get("weight_block_size")), scales)
    if method in ("modelopt", "modelopt_fp4", "modelopt_fp8"):
        algorithm = str(table.get("quant_algo", "")).upper()
        known: dict[str, tuple[FormatName, ...]] = {"NVFP4": ("nvfp4",), "FP8": ("fp8_tensor",)}
        if algorithm in known:
            return QuantisationTable(f"{method} {algorithm}", known[algorithm])
    if method == "compressed-tensors":
        return _read_compressed_tensors(table)
    raise CheckpointError(
        f"quantised by {method or 'an unnamed method'} {table.get('quant_algo', '')}".rstrip()
        + ", which is not read",
        where=where,
        why="read: fp8, mxfp8, compressed-tensors (FP8, INT8, INT4, NVFP4), modelopt (NVFP4, FP8)",
        fix="start from the checkpoint that the quantised one was made from",
    )


def _read_compressed_tensors(table: Mapping[str, Any]) -> QuantisationTable:
    groups = table.get("config_groups")
    schemes = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, dict) else []
    formats: list[FormatName] = []
    block = None
    for scheme in schemes:
        bits, kind = scheme.get("num_bits"), scheme.get("type", "int")
        if (bits, kind) == (4, "float"):
            formats.append("nvfp4")
        elif kind == "float":
            formats.extend((*_FP8, "mxfp8"))
            block = _block(scheme.get("block_structure")) or block
        else:
            formats.append("int4" if bits == 4 else "int8")
    return QuantisationTable(f"compressed-tensors {table.get('format', '')}".rstrip(), tuple(formats), block)


def _block(size: Any) -> tuple[int, int] | None:
    if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return size[0], size[1]
    return None
