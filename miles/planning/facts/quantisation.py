"""How a checkpoint's weights are quantised: what its config says, and what its tensors show."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from miles.arch.safetensors_header import TensorEntry

Method = Literal["fp8", "mxfp8", "nvfp4", "int4"]

LOW_PRECISION_DTYPES = ("F8_E4M3", "F8_E5M2", "F4", "I32", "U8", "I8")
"""Codes of the tensors that hold quantised weights; packed INT4 is stored as I32."""

NEVER_QUANTISED = re.compile(r"(embed_tokens|lm_head|norm|mlp\.gate)\.weight(_packed)?$")
"""Embedding, head, norms and routers: quantised, they cost more accuracy than bytes."""

SCALES = re.compile(r"\.weight_(scale|scale_inv|scale_2|zero_point|shape|g_idx)$|\.input_scale$")
"""Tensors that only exist because others are quantised."""


@dataclass(frozen=True)
class Quantisation:
    """The quantisation of a checkpoint. `method` is None where config.json names one that we do not know."""

    name: str
    method: Method | None
    block_size: tuple[int, ...] = ()
    """Rows and columns that share a scale, of block formats."""
    group_size: int | None = None
    """Weights in a row that share a scale, of INT4."""
    scales: Literal["fp32", "pow2"] | None = None
    low_precision_layers: frozenset[int] = frozenset()
    """Decoder layers with at least one quantised weight, by the headers."""
    wrongly_quantised: tuple[str, ...] = ()
    """Quantised tensors that every format leaves in high precision."""
    quantised: frozenset[str] = frozenset()
    """Published names of all quantised weights, by the headers."""

    def __str__(self) -> str:
        block = f" in blocks of {'x'.join(map(str, self.block_size))}" if self.block_size else ""
        group = f" in groups of {self.group_size}" if self.group_size else ""
        return f"{self.method or self.name}{block}{group}"


def read_quantisation(config: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> Quantisation | None:
    """Read `quantization_config` of a config.json; None for a checkpoint in plain numbers."""
    table = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(table, dict):
        return None
    low = [name for name, entry in entries.items() if _is_low_precision(name, entry)]
    scheme = _weight_scheme(table)
    block = table.get("weight_block_size") or ()
    return Quantisation(
        name=str(table.get("quant_method", "unknown")),
        method=_method(table, scheme),
        block_size=tuple(block) if isinstance(block, list) else (),
        group_size=scheme.get("group_size"),
        scales=_scales(table),
        low_precision_layers=_layers(low),
        wrongly_quantised=tuple(name for name in low if NEVER_QUANTISED.search(name)),
        quantised=frozenset(name.removesuffix("_packed") for name in low),
    )


def _is_low_precision(name: str, entry: TensorEntry) -> bool:
    return entry.dtype in LOW_PRECISION_DTYPES and not SCALES.search(name)


def _weight_scheme(table: Mapping[str, Any]) -> dict[str, Any]:
    """The weights' entry of compressed-tensors' first group; for other methods the table itself."""
    groups = table.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return {"num_bits": table.get("bits"), "group_size": table.get("group_size")}
    first = next(iter(groups.values()))
    weights = first.get("weights") if isinstance(first, dict) else None
    return weights if isinstance(weights, dict) else {}


def _method(table: Mapping[str, Any], scheme: Mapping[str, Any]) -> Method | None:
    named = str(table.get("quant_method", "")).lower()
    if named in ("fp8", "mxfp8", "nvfp4"):
        return named  # type: ignore[return-value]
    if "nvfp4" in str(table.get("format", "") or table.get("quant_algo", "")).lower():
        return "nvfp4"
    if scheme.get("num_bits") == 4 and scheme.get("type", "int") == "int":
        return "int4"
    return None


def _scales(table: Mapping[str, Any]) -> Literal["fp32", "pow2"] | None:
    """DeepSeek V3.1 and later write `scale_fmt: ue8m0`, which are powers of two."""
    if table.get("quant_method") != "fp8":
        return None
    return "pow2" if str(table.get("scale_fmt", "")).lower() == "ue8m0" else "fp32"


def _layers(names: Iterable[str]) -> frozenset[int]:
    found = (re.search(r"\.layers\.(\d+)\.", name) for name in names)
    return frozenset(int(match[1]) for match in found if match)
