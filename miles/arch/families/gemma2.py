"""Gemma 2 (https://arxiv.org/abs/2408.00118): every other layer sees a window; soft caps."""

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
from miles.arch.hf_config import HfConfig, rope_scaling
from miles.arch.spec import ArchSpec

_DEFAULTS = gemma_like.DEFAULTS | {
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "rope_theta": 1e4,
    "max_position_embeddings": 8192,
}


def _from_hf_config(config: HfConfig) -> ArchSpec:
    config = config.filled(_DEFAULTS)
    rope = config.rope(config.count("head_dim"))
    layers = read_layers(config, layer_kinds(config, 2), {FULL: rope, WINDOWED: rope}, qk_norm=False)
    return make_spec(config, FAMILY.name, "Gemma2ForCausalLM", layers, **gemma_like.around_layers(config))


def _to_hf_config(spec: ArchSpec) -> dict[str, Any]:
    rope = spec.layers[0].attention.rope
    return gemma_hf_config(spec) | {"rope_theta": rope.theta, "rope_scaling": rope_scaling(rope)}


FAMILY = gemma_family("gemma2", "Gemma2ForCausalLM", _from_hf_config, _to_hf_config)
