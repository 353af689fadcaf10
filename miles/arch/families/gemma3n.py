"""Gemma 3n (https://ai.google.dev/gemma/docs/gemma-3n): Gemma 3 over several residual streams, with an
embedding for every layer, sparse gates in the first ones, and last layers that use the keys of earlier ones.

`gemma3n_text` is a language model alone; `gemma3n` the one inside a checkpoint with towers for pictures and
sound, whose tensors are carried along and not computed with. So are keys and values of the last layers, which
published checkpoints hold and nobody uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from miles.arch.families import gemma_like
from miles.arch.families.gemma3 import read_ropes, write_ropes
from miles.arch.families.gemma_like import gemma_hf_config, layer_kinds, read_layers
from miles.arch.families.llama_like import make_spec
from miles.arch.family import Family, Shape
from miles.arch.hf_config import HfConfig, around_text
from miles.arch.spec import ArchSpec, DenseMlpSpec, StreamsSpec

STREAM_LAYER: Mapping[str, str] = {
    "addition.router_norm": "altup.router_norm.weight",
    "addition.router": "altup.modality_router.weight",
    "addition.predict": "altup.prediction_coefs.weight",
    "addition.correct": "altup.correction_coefs.weight",
    "addition.output_scale": "altup.correct_output_scale",
    "addition.laurel_down": "laurel.linear_left.weight",
    "addition.laurel_up": "laurel.linear_right.weight",
    "addition.laurel_norm": "laurel.post_laurel_norm.weight",
    "addition.embed_gate": "per_layer_input_gate.weight",
    "addition.embed_up": "per_layer_projection.weight",
    "addition.embed_norm": "post_per_layer_input_norm.weight",
}
"""Native and published names of what a layer has beside its blocks."""
_DEFAULTS = gemma_like.DEFAULTS | {
    "vocab_size": 262400,
    "num_key_value_heads": 2,
    "sliding_window": 512,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "max_position_embeddings": 32768,
    "final_logit_softcapping": 30.0,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "altup_num_inputs": 4,
    "num_kv_shared_layers": 15,
    "laurel_rank": 64,
}
_TOWERS = ("model.vision_tower.", "model.audio_tower.", "model.embed_vision.", "model.embed_audio.")
_SPARSE_LAYERS, _SPARSITY = 10, 0.95
"""Layers with sparse gates, and how sparse, where config.json does not say."""
_OUTER = ("architectures", "model_type", "eos_token_id", "bos_token_id", "torch_dtype")


def stream_names(streams: StreamsSpec) -> dict[str, str]:
    """Native and published names of what stands around the layers."""
    names = {
        "layer_embed": "embed_tokens_per_layer.weight",
        "layer_projection": "per_layer_model_projection.weight",
        "layer_norm": "per_layer_projection_norm.weight",
    }
    for other in range(streams.count - 1):
        names[f"spread_maps.{other}"] = f"altup_projections.{other}.weight"
        names[f"merge_maps.{other}"] = f"altup_unembed_projections.{other}.weight"
    return names


def _read_text(config: HfConfig) -> ArchSpec:
    return _read(config.filled(_DEFAULTS), TEXT, "model")


def _read_whole(config: HfConfig) -> ArchSpec:
    return _read(config.filled(_DEFAULTS, part="text_config"), WHOLE, "model.language_model")


def _read(config: HfConfig, family: Family, root: str) -> ArchSpec:
    config.refuse("altup_active_idx", supported=0, default=0)
    config.refuse("altup_correct_scale", supported=True, default=True)
    kinds = layer_kinds(config, 5)
    count = len(kinds)
    widths = _per_layer(config, "intermediate_size", count, 16384)
    sparse = [_SPARSITY if i < _SPARSE_LAYERS < count else 0.0 for i in range(count)]
    sparsity = _per_layer(config, "activation_sparsity_pattern", count, sparse)
    same_width = HfConfig({**config.values, "intermediate_size": 1, "query_pre_attn_scalar": 1}, config.where)
    same_width.problems = config.problems
    layers = read_layers(same_width, kinds, read_ropes(config), qk_norm=True)
    sources = _key_sources(config, kinds)
    layers = tuple(
        replace(
            layer,
            attention=replace(layer.attention, v_unit=True, keys_of=source),
            mlp=DenseMlpSpec(width, "gelu_tanh", share),
        )
        for layer, source, width, share in zip(layers, sources, widths, sparsity, strict=True)
    )
    unused = tuple(
        f"{root}.layers.{i}.self_attn.{part}."
        for i, source in enumerate(sources)
        if source is not None
        for part in ("k_proj", "v_proj", "k_norm")
    )
    around = gemma_like.around_layers(config) | {"norm_plus_one": False, "streams": _streams(config)}
    others = unused + (_TOWERS if family is WHOLE else ())
    return make_spec(
        config, family.name, family.architectures[0], layers, root=root, other_parts=others, **around
    )


def _streams(config: HfConfig) -> StreamsSpec:
    return StreamsSpec(
        count=config.count("altup_num_inputs"),
        laurel_rank=config.count("laurel_rank"),
        layer_width=config.count("hidden_size_per_layer_input"),
        layer_vocab=config.count("vocab_size_per_layer_input"),
    )


def _per_layer(config: HfConfig, name: str, count: int, default: Any) -> list[Any]:
    """One number for all layers, or a list with one for each."""
    given = config.values.get(name)
    given = default if given is None else given
    values = given if isinstance(given, list) else [given] * count
    if len(values) != count or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        config.problem(f"{name} is neither a number nor a list of {count} numbers")
        return [1] * count
    return values


def _key_sources(config: HfConfig, kinds: list[str]) -> list[int | None]:
    """The last `num_kv_shared_layers` layers use the keys of the last layer of their kind before them."""
    first = len(kinds) - config.whole("num_kv_shared_layers", default=0)
    if set(kinds[: max(first, 0)]) != set(kinds):
        config.problem("num_kv_shared_layers leaves no layer of each kind with keys of its own")
        return [None] * len(kinds)
    last = {kind: index for index, kind in enumerate(kinds[:first])}
    return [last[kind] if index >= first else None for index, kind in enumerate(kinds)]


def _write_text(spec: ArchSpec) -> dict[str, Any]:
    streams, mlps = spec.streams, [layer.mlp for layer in spec.layers]
    assert streams is not None
    config = gemma_hf_config(spec) | write_ropes(spec)
    config.pop("query_pre_attn_scalar")
    config.pop("attn_logit_softcapping")
    return config | {
        "intermediate_size": [mlp.intermediate_size for mlp in mlps],
        "activation_sparsity_pattern": [m.sparsity for m in mlps if isinstance(m, DenseMlpSpec)],
        "num_kv_shared_layers": sum(layer.attention.keys_of is not None for layer in spec.layers),
        "altup_num_inputs": streams.count,
        "laurel_rank": streams.laurel_rank,
        "hidden_size_per_layer_input": streams.layer_width,
        "vocab_size_per_layer_input": streams.layer_vocab,
    }


def _write_whole(spec: ArchSpec) -> dict[str, Any]:
    return around_text(_write_text(spec), _OUTER, TEXT.name)


def _published_tensors(spec: ArchSpec) -> Iterator[tuple[str, Shape]]:
    streams, hidden, root = spec.streams, spec.hidden_size, spec.root
    assert streams is not None
    yield from gemma_like.published_tensors(spec)
    rows, count = spec.num_layers * streams.layer_width, streams.count
    shapes: dict[str, Shape] = {
        "layer_embed": (streams.layer_vocab, rows),
        "layer_projection": (rows, hidden),
        "layer_norm": (streams.layer_width,),
    }
    for ours, theirs in stream_names(streams).items():
        yield f"{root}.{theirs}", shapes.get(ours, (hidden, hidden))
    of_layer: dict[str, Shape] = {
        "addition.router": (count, hidden),
        "addition.predict": (count**2, count),
        "addition.correct": (count, count),
        "addition.laurel_down": (streams.laurel_rank, hidden),
        "addition.laurel_up": (hidden, streams.laurel_rank),
        "addition.embed_gate": (streams.layer_width, hidden),
        "addition.embed_up": (hidden, streams.layer_width),
    }
    for index in range(spec.num_layers):
        for ours, theirs in STREAM_LAYER.items():
            yield f"{root}.layers.{index}.{theirs}", of_layer.get(ours, (hidden,))


TEXT = replace(
    gemma_like.gemma_family("gemma3n_text", "Gemma3nForCausalLM", _read_text, _write_text),
    published_tensors=_published_tensors,
)
WHOLE = replace(
    TEXT,
    name="gemma3n",
    architectures=("Gemma3nForConditionalGeneration",),
    from_hf_config=_read_whole,
    to_hf_config=_write_whole,
)
FAMILIES = (TEXT, WHOLE)
