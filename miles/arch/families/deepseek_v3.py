"""DeepSeek-V3, V3.1 and R1 (https://arxiv.org/abs/2412.19437): multi-head latent attention, sigmoid-routed
experts in groups beside a shared one, MTP layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from miles.arch.families.llama_like import common_hf_config, make_spec
from miles.arch.families.moe_like import (
    first_dense_layers,
    moe_layer_tensors,
    read_sigmoid_moe,
    sigmoid_moe_config,
    sigmoid_moe_family,
)
from miles.arch.family import Shape
from miles.arch.hf_config import YARN, HfConfig
from miles.arch.spec import ArchSpec, AttentionSpec, LatentSpec, YarnScaling


def read_latent_attention(config: HfConfig) -> AttentionSpec:
    """Multi-head latent attention as one key head, see `AttentionSpec`."""
    heads, rank = config.count("num_attention_heads"), config.values.get("q_lora_rank")
    latent = LatentSpec(
        query_rank=None if rank is None else config.count("q_lora_rank"),
        kv_rank=config.count("kv_lora_rank"),
        plain_dim=config.count("qk_nope_head_dim"),
        rotated_dim=config.count("qk_rope_head_dim"),
        value_dim=config.count("v_head_dim"),
    )
    config.refuse("num_key_value_heads", supported=heads, default=heads)
    config.refuse("attention_bias", supported=False, default=False)
    config.refuse("hidden_act", supported="silu", default="silu")
    config.refuse("rope_interleave", supported=True, default=True)
    rope = config.rope(latent.rotated_dim, scalings=(YARN,))
    growth = rope.scaling.score_growth if isinstance(rope.scaling, YarnScaling) else 1.0
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=1,
        head_dim=latent.kv_rank + latent.rotated_dim,
        rope=replace(rope, width=latent.rotated_dim, interleaved=True),
        qkv_bias=False,
        output_bias=False,
        qk_norm=False,
        scale=latent.query_dim**-0.5 * growth,
        latent=latent,
    )


def latent_attention_config(spec: ArchSpec) -> dict[str, Any]:
    """`common_hf_config` with the keys that `read_latent_attention` reads."""
    attention = spec.layers[0].attention
    latent = attention.latent
    assert latent is not None
    config = common_hf_config(spec) | {
        "num_key_value_heads": attention.num_heads,
        "attention_bias": False,
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_nope_head_dim": latent.plain_dim,
        "qk_rope_head_dim": latent.rotated_dim,
        "v_head_dim": latent.value_dim,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    del config["head_dim"]
    return config


def latent_attention_tensors(
    prefix: str, attention: AttentionSpec, hidden_size: int
) -> Iterator[tuple[str, Shape]]:
    """Norms and attention of one layer; `prefix` is `model.layers.<i>`."""
    latent, heads = attention.latent, attention.num_heads
    assert latent is not None
    block, rank = f"{prefix}.self_attn", latent.query_rank
    yield f"{prefix}.input_layernorm.weight", (hidden_size,)
    if rank is None:
        yield f"{block}.q_proj.weight", (heads * latent.query_dim, hidden_size)
    else:
        yield f"{block}.q_a_proj.weight", (rank, hidden_size)
        yield f"{block}.q_a_layernorm.weight", (rank,)
        yield f"{block}.q_b_proj.weight", (heads * latent.query_dim, rank)
    yield f"{block}.kv_a_proj_with_mqa.weight", (latent.kv_rank + latent.rotated_dim, hidden_size)
    yield f"{block}.kv_a_layernorm.weight", (latent.kv_rank,)
    yield f"{block}.kv_b_proj.weight", (heads * (latent.plain_dim + latent.value_dim), latent.kv_rank)
    yield f"{block}.o_proj.weight", (hidden_size, heads * latent.value_dim)
    if attention.indexer is not None:
        width = attention.indexer.head_dim
        yield f"{block}.indexer.wq_b.weight", (attention.indexer.num_heads * width, rank or 0)
        yield f"{block}.indexer.wk.weight", (width, hidden_size)
        yield f"{block}.indexer.k_norm.weight", (width,)
        yield f"{block}.indexer.k_norm.bias", (width,)
        yield f"{block}.indexer.weights_proj.weight", (attention.indexer.num_heads, hidden_size)
    yield f"{prefix}.post_attention_layernorm.weight", (hidden_size,)


def _from_hf_config(config: HfConfig) -> ArchSpec:
    moe = read_sigmoid_moe(config, scaling=2.5)
    config.refuse("moe_layer_freq", supported=1, default=1)
    layers = first_dense_layers(config, read_latent_attention(config), moe)
    return make_spec(config, FAMILY.name, "DeepseekV3ForCausalLM", layers, shared_mtp_projection=False)


def _to_hf_config(spec: ArchSpec) -> dict[str, Any]:
    return latent_attention_config(spec) | sigmoid_moe_config(spec) | {"moe_layer_freq": 1}


layer_tensors = moe_layer_tensors(attention=latent_attention_tensors)

FAMILY = sigmoid_moe_family(
    "deepseek_v3", "DeepseekV3ForCausalLM", _from_hf_config, _to_hf_config, layer_tensors
)
