"""Gemma 3 (https://arxiv.org/abs/2503.19786): five layers with windows for each without one.

`gemma3_text` is a language model alone; `gemma3` the one inside a checkpoint with a vision tower, whose
tensors are carried along and not computed with.
"""

from __future__ import annotations

from typing import Any

from miles.arch.families import gemma_like
from miles.arch.families.gemma_like import (
    FULL,
    WINDOWED,
    gemma_family,
    gemma_hf_config,
    layer_kinds,
    read_layers,
)
from miles.arch.families.llama_like import make_spec
from miles.arch.hf_config import HfConfig, around_text, rope_scaling
from miles.arch.spec import ArchSpec, RopeSpec

_DEFAULTS = gemma_like.DEFAULTS | {
    "vocab_size": 262208,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "max_position_embeddings": 131072,
    "sliding_window_pattern": 6,
}
_OTHER_PARTS = ("vision_tower.", "multi_modal_projector.")
_ROOT = "language_model.model"
_OUTER = ("architectures", "model_type", "eos_token_id", "bos_token_id", "torch_dtype")
"""Keys of config.json that stand outside `text_config`."""


def _read_text(config: HfConfig) -> ArchSpec:
    return _read(config.filled(_DEFAULTS), TEXT.name, TEXT.architectures[0])


def _read_whole(config: HfConfig) -> ArchSpec:
    inner = config.filled(_DEFAULTS, part="text_config")
    return _read(inner, WHOLE.name, WHOLE.architectures[0], root=_ROOT, other_parts=_OTHER_PARTS)


def _read(config: HfConfig, family: str, architecture: str, **more: Any) -> ArchSpec:
    kinds = layer_kinds(config, config.count("sliding_window_pattern", "_sliding_window_pattern"))
    layers = read_layers(config, kinds, read_ropes(config), qk_norm=True)
    return make_spec(config, family, architecture, layers, **gemma_like.around_layers(config), **more)


def read_ropes(config: HfConfig) -> dict[str, RopeSpec]:
    """By kind of layer: `rope_theta`, `rope_scaling` and `rope_local_base_freq`, or a table for each kind."""
    values, tables = config.values, config.values.get("rope_parameters") or {}
    old = {
        FULL: {"rope_theta": values.get("rope_theta"), "rope_scaling": values.get("rope_scaling")},
        WINDOWED: {"rope_theta": values.get("rope_local_base_freq")},
    }
    ropes = {}
    for kind, flat in old.items():
        given = {"rope_parameters": tables[kind]} if isinstance(tables.get(kind), dict) else {}
        reader = HfConfig(flat | given, config.where)
        ropes[kind] = reader.rope(config.count("head_dim"))
        config.problems.extend(reader.problems)
    return ropes


def _write_text(spec: ArchSpec) -> dict[str, Any]:
    return gemma_hf_config(spec) | write_ropes(spec)


def write_ropes(spec: ArchSpec) -> dict[str, Any]:
    """What `read_ropes` reads."""
    full, windowed = gemma_like.rope_of(spec, windowed=False), gemma_like.rope_of(spec, windowed=True)
    told: dict[str, Any] = {}
    if full is not None:
        told |= {"rope_theta": full.theta, "rope_scaling": rope_scaling(full)}
    if windowed is not None:
        told |= {"rope_local_base_freq": windowed.theta}
    return told


def _write_whole(spec: ArchSpec) -> dict[str, Any]:
    return around_text(_write_text(spec), _OUTER, TEXT.name)


TEXT = gemma_family("gemma3_text", "Gemma3ForCausalLM", _read_text, _write_text)
WHOLE = gemma_family("gemma3", "Gemma3ForConditionalGeneration", _read_whole, _write_whole)
FAMILIES = (TEXT, WHOLE)
