"""A model of the same family and the same features, small enough for any machine.

>>> small_config(shipped_spec("deepseek-v3"), vocab_size=64)["n_routed_experts"]
8

What stays: kinds of layers in their order, ratios of heads, shared experts, routing, rotation, windows,
tying, MTP layers. What shrinks: widths, counts of layers, heads and experts, positions, vocabulary. Of a
model with towers the language model is left.
"""

from __future__ import annotations

from typing import Any

from miles.arch.checkpoint import to_hf_config
from miles.arch.spec import ArchSpec

LAYERS = 4
INITIALIZER_RANGE = 0.1
"""At these widths the published 0.02 makes every token equally likely, which looks like a broken engine."""
PERIOD_KEYS = ("sliding_window_pattern", "full_attention_interval", "interleave_moe_layer_step")
"""Every so many layers there is one of another kind: a whole period is kept."""

ALONE = ("ForConditionalGeneration", "ForCausalLM")
"""What a model with towers is called, and its language model alone."""

WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "moe_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "rotary_dim": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 16,
    "attention_chunk_size": 16,
    "first_k_dense_replace": 1,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_kv_shared_layers": 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 32,
    "laurel_rank": 8,
    "max_position_embeddings": 1024,
}
"""Largest value of each key; a smaller one stays."""


def small_config(spec: ArchSpec, vocab_size: int) -> dict[str, Any]:
    """The config.json of the small model, without the ids of special tokens."""
    config = to_hf_config(spec)
    if "text_config" in config:
        config |= config.pop("text_config")
        config["architectures"] = [name.replace(*ALONE) for name in config["architectures"]]
    layers = _layers(config)
    small = {key: _shrunk(key, value, spec.num_layers, layers) for key, value in config.items()}
    small |= {"num_hidden_layers": layers, "vocab_size": vocab_size, **_heads(config)}
    small["initializer_range"] = INITIALIZER_RANGE
    return {key: value for key, value in small.items() if not key.endswith("_token_id")}


def _layers(config: dict[str, Any]) -> int:
    """Enough for every kind of layer, in an even number."""
    kinds = config.get("layer_types") or ()
    period = max((config.get(key) or 1 for key in PERIOD_KEYS), default=1)
    if len(set(kinds)) > 1:
        period = max(period, 1 + max(kinds.index(kind) for kind in set(kinds)))
    if config.get("num_kv_shared_layers"):
        period *= 2  # those that share come after those that they share with
    return min(int(config["num_hidden_layers"]), max(LAYERS, period + period % 2))


def _shrunk(key: str, value: Any, before: int, layers: int) -> Any:
    if isinstance(value, list) and len(value) == before:
        # One entry per layer.
        return [_shrunk(key, item, before, layers) for item in value[:layers]]
    limit = WIDTHS.get(key)
    return min(value, limit) if limit is not None and isinstance(value, int) and value > 0 else value


def _heads(config: dict[str, Any]) -> dict[str, int]:
    """Two groups of at most four query heads; one group, or as many groups as heads, stays that."""
    heads = int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    if groups == heads:
        return {"num_attention_heads": 4, "num_key_value_heads": 4}
    kept = min(groups, 2)
    return {"num_attention_heads": kept * min(heads // groups, 4), "num_key_value_heads": kept}
