"""A quantised checkpoint's table tells preflight, and any other reader, what the policy says."""

from __future__ import annotations

import pytest
from compressed_tensors.quantization import QuantizationConfig

from miles.arch import published_tensors
from miles.arch.precision import FormatName, NumberFormat, PrecisionPolicy, precision_policy
from miles.arch.quantization_config import kept_modules, quantization_config
from miles.arch.specs import shipped_spec
from miles.planning.facts.quantisation import Quantisation, read_quantisation

SPEC = shipped_spec("qwen3-30b-a3b")
SHAPES = published_tensors(SPEC)


def policy(name: FormatName, **conventions: object) -> PrecisionPolicy:
    return precision_policy(SPEC, "bf16", NumberFormat(name, **conventions), last_layers=1)  # type: ignore[arg-type]


def read_back(stored: PrecisionPolicy) -> Quantisation:
    table = quantization_config(stored, SHAPES)
    found = read_quantisation({"quantization_config": table}, {})
    assert found is not None
    return found


def test_preflight_reads_what_was_written() -> None:
    fp8 = read_back(policy("fp8"))
    assert (fp8.method, fp8.block_size, fp8.scales) == ("fp8", (128, 128), "fp32")
    assert read_back(policy("fp8", scales="pow2")).scales == "pow2"
    assert str(read_back(policy("mxfp8"))) == "mxfp8 in blocks of 1x32"
    assert str(read_back(policy("int4", group_size=128))) == "int4 in groups of 128"
    assert read_back(policy("nvfp4")).method == "nvfp4"
    assert quantization_config(policy("bf16"), SHAPES) is None


def test_what_stays_plain_is_listed_and_experts_once() -> None:
    kept = kept_modules(policy("fp8"), SHAPES)
    assert {"model.embed_tokens", "lm_head", "model.layers.0.mlp.gate", "model.layers.47.mlp.gate"} < set(
        kept
    )
    assert "model.layers.47.mlp.experts" in kept and "model.layers.46.mlp.experts" not in kept
    assert "model.layers.47.self_attn.q_proj" in kept and "model.layers.0.self_attn.q_proj" not in kept
    assert "model.norm" not in kept, "norms are no matrices"
    ignored = quantization_config(policy("int4"), SHAPES)["ignore"]  # type: ignore[index]
    assert r"re:model\.layers\.47\.mlp\.experts\..*" in ignored
    assert "model.layers.0.self_attn.q_proj" in ignored, "four bits take experts alone"


@pytest.mark.parametrize("name", ["int4", "int8", "fp8_channel", "fp8_tensor"])
def test_compressed_tensors_accepts_its_tables(name: FormatName) -> None:
    table = quantization_config(policy(name), SHAPES)
    found = QuantizationConfig.model_validate(table)
    weights = found.config_groups["group_0"].weights
    assert weights is not None and weights.num_bits == (4 if name == "int4" else 8)
    assert found.format == table["format"]  # type: ignore[index]
