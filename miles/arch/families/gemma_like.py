"""What Gemma 2 and 3 share: norms before and behind both blocks, GeGLU, windows in most layers, scaled and
tied embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from miles.arch.families.llama_like import (
    MTP_NAMES,
    attention_tensors,
    dense_hf_config,
    embedding_tensors,
    swiglu_tensors,
)
from miles.arch.family import Family, Shape
from miles.arch.hf_config import HfConfig
from miles.arch.spec import ArchSpec, AttentionSpec, DenseMlpSpec, LayerSpec, RopeSpec

WINDOWED, FULL = "sliding_attention", "full_attention"
"""Kinds of layers, as `layer_types` calls them."""
ACTIVATION = "gelu_pytorch_tanh"

DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
"""What published configs may leave out."""


def layer_kinds(config: HfConfig, pattern: int) -> list[str]:
    """The kind of every layer: `layer_types`, or a full layer every `pattern` layers."""
    count, given = config.count("num_hidden_layers"), config.values.get("layer_types")
    if given is None:
        return [WINDOWED if (i + 1) % pattern else FULL for i in range(count)]
    if not isinstance(given, list) or len(given) != count or set(given) - {WINDOWED, FULL}:
        config.problem(f"layer_types is not a list of {count} names out of {WINDOWED} and {FULL}")
        return [FULL] * count
    return given


def read_layers(
    config: HfConfig, kinds: list[str], ropes: Mapping[str, RopeSpec], *, qk_norm: bool
) -> tuple[LayerSpec, ...]:
    """Layers that differ in what they see and how they rotate. `ropes`: by kind."""
    config.refuse("hidden_activation", supported=ACTIVATION, default=ACTIVATION)
    config.refuse("use_bidirectional_attention", supported=False, default=False)
    num_heads, num_kv_heads = config.count("num_attention_heads"), config.count("num_key_value_heads")
    head_dim = config.count("head_dim")
    if num_heads % num_kv_heads:
        config.problem(
            f"num_attention_heads = {num_heads} is not a multiple of num_key_value_heads = {num_kv_heads}"
        )
    if head_dim % 2:
        config.problem(f"head_dim = {head_dim} is odd: rotary embedding rotates pairs")
    bias = config.flag("attention_bias", default=False)
    full = AttentionSpec(
        num_heads,
        num_kv_heads,
        head_dim,
        ropes[FULL],
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=qk_norm,
        scale=config.number("query_pre_attn_scalar") ** -0.5,
        softcap=optional_number(config, "attn_logit_softcapping"),
    )
    windowed = replace(full, rope=ropes[WINDOWED], window=config.count("sliding_window"))
    mlp = DenseMlpSpec(config.count("intermediate_size"), "gelu_tanh")
    return tuple(LayerSpec(windowed if kind == WINDOWED else full, mlp, output_norms=True) for kind in kinds)


def optional_number(config: HfConfig, name: str) -> float | None:
    """A number > 0; None where it is left out or null."""
    return None if config.values.get(name) is None else config.number(name)


def around_layers(config: HfConfig) -> dict[str, Any]:
    """Fields of ArchSpec that these families set."""
    if config.mtp_num_layers():
        config.problem("MTP layers are not known of this family")
    return {
        "norm_plus_one": True,
        "embedding_scale": config.count("hidden_size") ** 0.5,
        "logit_softcap": optional_number(config, "final_logit_softcapping"),
    }


def gemma_hf_config(spec: ArchSpec) -> dict[str, Any]:
    """The config.json keys of a text model but those of its rotation."""
    attention = spec.layers[0].attention
    assert attention.scale is not None
    kinds = [FULL if layer.attention.window is None else WINDOWED for layer in spec.layers]
    windows = [layer.attention.window for layer in spec.layers if layer.attention.window is not None]
    config = dense_hf_config(spec)
    for key in ("hidden_act", "rope_theta", "rope_scaling"):
        config.pop(key)
    return config | {
        "hidden_activation": ACTIVATION,
        "attention_bias": attention.qkv_bias,
        "query_pre_attn_scalar": round(attention.scale**-2),
        "attn_logit_softcapping": attention.softcap,
        "final_logit_softcapping": spec.logit_softcap,
        "layer_types": kinds,
        **({"sliding_window": windows[0]} if windows else {}),
    }


def rope_of(spec: ArchSpec, windowed: bool) -> RopeSpec | None:
    """The rotation of a kind of layers; None where there is no such layer."""
    ropes = [x.attention.rope for x in spec.layers if (x.attention.window is not None) == windowed]
    return ropes[0] if ropes else None


def layer_tensors(prefix: str, layer: LayerSpec, hidden_size: int) -> Iterator[tuple[str, Shape]]:
    assert isinstance(layer.mlp, DenseMlpSpec)
    yield from attention_tensors(prefix, layer.attention, hidden_size)
    yield f"{prefix}.pre_feedforward_layernorm.weight", (hidden_size,)
    yield f"{prefix}.post_feedforward_layernorm.weight", (hidden_size,)
    yield from swiglu_tensors(f"{prefix}.mlp", layer.mlp.intermediate_size, hidden_size)


def published_tensors(spec: ArchSpec) -> Iterator[tuple[str, Shape]]:
    yield from embedding_tensors(spec)
    for index, layer in enumerate(spec.layers):
        yield from layer_tensors(f"{spec.root}.layers.{index}", layer, spec.hidden_size)


def gemma_family(
    name: str,
    architecture: str,
    read: Callable[[HfConfig], ArchSpec],
    write: Callable[[ArchSpec], dict[str, Any]],
) -> Family:
    """A row for `FAMILIES`; its config.json is what differs."""
    return Family(
        name=name,
        architectures=(architecture,),
        from_hf_config=read,
        to_hf_config=write,
        published_tensors=published_tensors,
        layer_tensors=layer_tensors,
        mtp_names=MTP_NAMES,
        shared_mtp_projection=True,
        takes_mtp=False,
    )
