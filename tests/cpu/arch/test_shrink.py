"""A small model of a family has the features of the large one: a rehearsal passes through the same code."""

from __future__ import annotations

import pytest

from miles.arch import ArchSpec
from miles.arch.checkpoint import spec_from_hf_config
from miles.arch.shrink import small_config
from miles.arch.spec import MoeSpec
from miles.arch.specs import shipped_names, shipped_spec

VOCABULARY = 55
MOST_PARAMETERS = 1_000_000


def small(spec: ArchSpec) -> ArchSpec:
    return spec_from_hf_config(small_config(spec, VOCABULARY), where="config.json")


def kinds(spec: ArchSpec) -> set[tuple[object, ...]]:
    """What the layers of a model differ in."""
    return {
        (
            type(layer.attention).__name__,
            type(layer.mlp).__name__,
            layer.attention.qk_norm,
            layer.attention.qkv_bias,
            layer.attention.num_heads == layer.attention.num_kv_heads,
            isinstance(layer.mlp, MoeSpec) and (layer.mlp.scoring, layer.mlp.norm_topk_prob),
        )
        for layer in spec.layers
    }


@pytest.mark.parametrize("name", shipped_names())
def test_the_small_model_has_the_kinds_of_layers_of_the_large_one(name: str) -> None:
    large = shipped_spec(name)
    made = small(large)
    # Of a model with towers the language model is left.
    assert made.family in (large.family, f"{large.family}_text")
    assert kinds(made) == kinds(large)
    assert made.tie_word_embeddings == large.tie_word_embeddings
    assert made.mtp_num_layers == large.mtp_num_layers
    assert made.num_parameters() < MOST_PARAMETERS


def test_what_grows_with_a_model_is_small() -> None:
    made = small(shipped_spec("deepseek-v3"))
    assert (made.num_layers, made.num_experts, made.top_k, made.vocab_size) == (4, 8, 2, VOCABULARY)
    assert len(made.moe_layers) == 3, "one dense layer comes first"


def test_ratios_of_heads_stay_up_to_four() -> None:
    made = small(shipped_spec("qwen3-30b-a3b")).layers[0].attention
    assert (made.num_heads, made.num_kv_heads) == (8, 2)
    one = small(shipped_spec("gemma-3-1b")).layers[0].attention
    assert (one.num_heads, one.num_kv_heads) == (4, 1)
