"""config.json -> ArchSpec: what is read, what is refused, and the published parameter counts."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest

from miles.arch import (
    DenseMlpSpec,
    MoeSpec,
    load_spec,
    published_tensors,
    spec_from_hf_config,
    to_hf_config,
    with_mtp,
)
from miles.errors import CheckpointError

DENSE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151645,
}
QWEN3_4B = DENSE | {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
}
QWEN3_30B_A3B = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def test_parameter_counts_are_the_published_ones() -> None:
    assert round(spec_from_hf_config(DENSE).num_parameters() / 1e9, 3) == 0.596
    assert round(spec_from_hf_config(QWEN3_4B).num_parameters() / 1e9, 2) == 4.02
    moe = spec_from_hf_config(QWEN3_30B_A3B)
    assert round(moe.num_parameters() / 1e9, 2) == 30.53
    assert round(moe.num_active_parameters() / 1e9, 2) == 3.35


@pytest.mark.parametrize("config", [DENSE, QWEN3_30B_A3B, DENSE | {"attention_bias": True}])
def test_published_tensors_add_up_to_the_parameter_count(config: dict[str, Any]) -> None:
    spec = spec_from_hf_config(config)
    assert sum(map(prod, published_tensors(spec).values())) == spec.num_parameters()


@pytest.mark.parametrize(
    "config",
    [
        DENSE,
        DENSE | {"attention_bias": True},
        QWEN3_30B_A3B | {"mlp_only_layers": [0, 3], "eos_token_id": [3, 1]},
    ],
)
def test_a_written_config_reads_back_equal(config: dict[str, Any]) -> None:
    spec = spec_from_hf_config(config)
    assert spec_from_hf_config(to_hf_config(spec)) == spec


def test_rope_theta_is_found_in_either_place() -> None:
    new_style = {k: v for k, v in DENSE.items() if k != "rope_theta"}
    new_style["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    assert spec_from_hf_config(new_style).layers[0].attention.rope.theta == 5e5
    assert spec_from_hf_config(DENSE).layers[0].attention.rope.theta == 1e6


def test_moe_layers_follow_sparse_step_and_mlp_only_layers() -> None:
    spec = spec_from_hf_config(
        QWEN3_30B_A3B | {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    )
    assert spec.moe_layers == (1, 5)
    assert [type(layer.mlp) for layer in spec.layers].count(DenseMlpSpec) == 4
    assert spec.layers[3].mlp == DenseMlpSpec(6144)
    assert spec.layers[5].mlp == MoeSpec(128, 8, 768, norm_topk_prob=True)
    assert (spec.num_experts, spec.top_k) == (128, 8)


def test_all_missing_keys_are_named_in_one_error() -> None:
    broken = {k: v for k, v in DENSE.items() if k not in ("vocab_size", "num_attention_heads", "rope_theta")}
    with pytest.raises(CheckpointError) as error:
        spec_from_hf_config(broken, where="here/config.json")
    for key in (
        "vocab_size is missing",
        "num_attention_heads is missing",
        "rope_theta is missing",
        "here/config.json",
    ):
        assert key in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads = 16 is not a multiple of num_key_value_heads = 3"),
        ({"head_dim": 7}, "head_dim = 7 is odd"),
        ({"hidden_size": "1024"}, "hidden_size = '1024' is not a whole number"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_scaling of type 'yarn' is not supported",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling of type 'linear'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ({"torch_dtype": "float8"}, "dtype = 'float8' is not one of"),
        ({"eos_token_id": "x"}, "eos_token_id = 'x' is not a token id"),
    ],
)
def test_inconsistent_or_unsupported_values_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=".*" + message.split("(")[0]):
        spec_from_hf_config(DENSE | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 200}, "num_experts_per_tok = 200 exceeds num_experts = 128"),
        ({"mlp_only_layers": [99]}, "mlp_only_layers names"),
        ({"decoder_sparse_step": 1000}, "leave no layer with experts"),
    ],
)
def test_inconsistent_experts_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        spec_from_hf_config(QWEN3_30B_A3B | change)


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "mtp_num_hidden_layers"])
def test_mtp_layers_are_counted_and_written_back(key: str) -> None:
    spec = spec_from_hf_config(QWEN3_30B_A3B | {key: 1})
    assert spec.mtp_num_layers == 1 and spec.mtp is not None and spec.mtp.layers == spec.layers[-1:]
    assert spec.num_parameters() == spec.policy.num_parameters()
    assert spec_from_hf_config(to_hf_config(spec)) == spec
    assert "num_nextn_predict_layers" not in to_hf_config(spec.policy)
    assert with_mtp(spec, 2).mtp_num_layers == 2 and with_mtp(spec, 0) == spec.policy
    assert spec_from_hf_config(QWEN3_30B_A3B | {key: 0}).mtp is None
    with pytest.raises(CheckpointError, match=f"{key} = 'one'"):
        spec_from_hf_config(QWEN3_30B_A3B | {key: "one"})


def test_an_unknown_family_is_refused_with_the_supported_ones() -> None:
    with pytest.raises(CheckpointError) as error:
        spec_from_hf_config({"architectures": ["FalconForCausalLM"]})
    assert "FalconForCausalLM" in str(error.value)
    assert "Qwen3ForCausalLM, Qwen3MoeForCausalLM" in str(error.value)


def test_model_type_decides_when_architectures_is_absent() -> None:
    config = {k: v for k, v in DENSE.items() if k != "architectures"} | {"model_type": "qwen3"}
    assert spec_from_hf_config(config).architecture == "Qwen3ForCausalLM"


def test_stop_tokens_come_from_config_and_generation_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    assert load_spec(tmp_path).eos_token_ids == (151645,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151643]}))
    assert load_spec(tmp_path).eos_token_ids == (151645, 151643)


def test_a_directory_without_config_or_with_a_broken_one_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        load_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        load_spec(tmp_path)
