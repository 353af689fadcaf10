"""Llama 4 (https://ai.meta.com/blog/llama-4-multimodal-intelligence): three layers that rotate and see their
chunk for each one without positions that sees everything; top-1 experts, scaled at their input, beside a
shared one, in every layer or in every other.

`llama4_text` is a language model alone; `llama4` the one inside a checkpoint with a vision model, whose
tensors are carried along and not computed with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from miles.arch.families.llama_like import MTP_NAMES, common_hf_config, make_spec, read_attention
from miles.arch.families.moe_like import check_experts, moe_layer_tensors, published_tensors
from miles.arch.family import Family, MoeNames
from miles.arch.hf_config import HfConfig, around_text
from miles.arch.spec import ArchSpec, AttentionSpec, DenseMlpSpec, LayerSpec, MoeSpec, QueryTemperature

NAMES = MoeNames(
    block="feed_forward", router="router.weight", shared="shared_expert", dense_block="feed_forward"
)
CHUNKED, FULL = "chunked_attention", "full_attention"
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 1,
    "num_local_experts": 16,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "rope_theta": 5e5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What published configs may leave out."""
_OTHER_PARTS = ("vision_model.", "multi_modal_projector.")
_OUTER = ("architectures", "model_type", "torch_dtype", "tie_word_embeddings")


def _read_text(config: HfConfig) -> ArchSpec:
    return _read(config.filled(_DEFAULTS), TEXT)


def _read_whole(config: HfConfig) -> ArchSpec:
    inner = config.filled(_DEFAULTS, part="text_config")
    return _read(inner, WHOLE, root="language_model.model", other_parts=_OTHER_PARTS)


def _read(config: HfConfig, family: Family, **more: Any) -> ArchSpec:
    if config.mtp_num_layers():
        config.problem("MTP layers are not known of this family")
    count = config.count("num_hidden_layers")
    rotating, chunked = _rotating_layers(config, count), _chunked_layers(config, count)
    kinds = [_attention(config, *kind) for kind in zip(rotating, chunked, strict=True)]
    moe, dense = _moe(config), DenseMlpSpec(config.count("intermediate_size_mlp"))
    with_experts = _moe_layers(config, count)
    layers = tuple(LayerSpec(kinds[i], moe if i in with_experts else dense) for i in range(count))
    return make_spec(config, family.name, family.architectures[0], layers, **more)


def _rotating_layers(config: HfConfig, count: int) -> list[bool]:
    """`no_rope_layers` holds 1 where a layer rotates; empty: all but every so many."""
    given = config.values.get("no_rope_layers") or []
    if not given:
        interval = config.count("no_rope_layer_interval")
        return [(i + 1) % interval != 0 for i in range(count)]
    if not isinstance(given, list) or len(given) != count or set(given) - {0, 1}:
        config.problem(f"no_rope_layers is not a list of {count} zeros and ones")
        return [True] * count
    return [bool(rotates) for rotates in given]


def _chunked_layers(config: HfConfig, count: int) -> list[bool]:
    """`layer_types`; by default the layers that rotate see their chunk."""
    given = config.values.get("layer_types")
    if given is None:
        return _rotating_layers(config, count)
    if not isinstance(given, list) or len(given) != count or set(given) - {CHUNKED, FULL}:
        config.problem(f"layer_types is not a list of {count} names out of {CHUNKED} and {FULL}")
        return [False] * count
    return [kind == CHUNKED for kind in given]


def _moe_layers(config: HfConfig, count: int) -> frozenset[int]:
    if config.values.get("moe_layers") is not None:
        return frozenset(config.indices("moe_layers"))
    step = config.count("interleave_moe_layer_step")
    return frozenset(range(step - 1, count, step))


def _attention(config: HfConfig, rotates: bool, chunked: bool) -> AttentionSpec:
    bias = config.flag("attention_bias", default=False)
    attention = read_attention(config, None, qkv_bias=bias, output_bias=bias, qk_norm=False)
    tuned = config.flag("attn_temperature_tuning", default=True) and not rotates
    return replace(
        attention,
        rope=replace(attention.rope, interleaved=True),
        chunk=config.count("attention_chunk_size") if chunked else None,
        rotates=rotates,
        qk_unit=rotates and config.flag("use_qk_norm", default=True),
        temperature=QueryTemperature(config.number("attn_scale"), config.number("floor_scale"))
        if tuned
        else None,
    )


def _moe(config: HfConfig) -> MoeSpec:
    width = config.count("intermediate_size")
    moe = MoeSpec(
        num_experts=config.count("num_local_experts"),
        top_k=config.count("num_experts_per_tok"),
        intermediate_size=width,
        norm_topk_prob=False,
        scoring="sigmoid",
        scales_inputs=True,
        stacked=True,
        shared_size=width,
    )
    check_experts(config, moe)
    return moe


def _write_text(spec: ArchSpec) -> dict[str, Any]:
    moe, attentions = spec.moe, [layer.attention for layer in spec.layers]
    assert moe is not None
    dense = [x.mlp.intermediate_size for x in spec.layers if isinstance(x.mlp, DenseMlpSpec)]
    chunks = [attention.chunk for attention in attentions if attention.chunk is not None]
    tuned = [attention.temperature for attention in attentions if attention.temperature is not None]
    config = common_hf_config(spec) | {
        "attention_bias": attentions[0].qkv_bias,
        "intermediate_size": moe.intermediate_size,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_layers": list(spec.moe_layers),
        "no_rope_layers": [int(attention.rotates) for attention in attentions],
        "layer_types": [CHUNKED if attention.chunk else FULL for attention in attentions],
        "use_qk_norm": any(attention.qk_unit for attention in attentions),
        "attn_temperature_tuning": bool(tuned),
    }
    config |= {"intermediate_size_mlp": dense[0]} if dense else {}
    config |= {"attention_chunk_size": chunks[0]} if chunks else {}
    config |= {"attn_scale": tuned[0].scale, "floor_scale": tuned[0].floor} if tuned else {}
    return config


def _write_whole(spec: ArchSpec) -> dict[str, Any]:
    return around_text(_write_text(spec), _OUTER, TEXT.name)


_layer_tensors = moe_layer_tensors(NAMES)

TEXT = Family(
    name="llama4_text",
    architectures=("Llama4ForCausalLM",),
    from_hf_config=_read_text,
    to_hf_config=_write_text,
    published_tensors=published_tensors(_layer_tensors),
    layer_tensors=_layer_tensors,
    mtp_names=MTP_NAMES,
    shared_mtp_projection=True,
    moe_names=NAMES,
    takes_mtp=False,
)
WHOLE = replace(
    TEXT,
    name="llama4",
    architectures=("Llama4ForConditionalGeneration",),
    from_hf_config=_read_whole,
    to_hf_config=_write_whole,
)
FAMILIES = (TEXT, WHOLE)
