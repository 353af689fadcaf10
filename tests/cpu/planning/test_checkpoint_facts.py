"""What preflight reads of quantised checkpoints and of chat templates, from real files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from miles.arch import published_tensors, spec_from_hf_config
from miles.arch.precision import NumberFormat
from miles.arch.safetensors_header import TensorEntry
from miles.config import RunConfig
from miles.data.tasks import sort
from miles.planning.facts import collect_facts
from miles.planning.facts.checkpoint import read_checkpoint, read_load_quantisation
from miles.planning.facts.critic import read_critic_facts
from miles.planning.facts.quantisation import Quantisation, read_quantisation
from miles.weights.convert import Wanted, convert, open_source, plan_conversion

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}}},
}


def entry(name: str, dtype: str) -> TensorEntry:
    return TensorEntry(name, dtype, (4, 4), Path("model.safetensors"), 16)


def look(table: dict[str, Any], **dtypes: str) -> Quantisation:
    """The quantisation of a config and of tensors under `layers.<i>.<name>`."""
    entries = {name: entry(name, dtype) for name, dtype in dtypes.items()}
    found = read_quantisation({"quantization_config": table}, entries)
    assert found is not None
    return found


def test_plain_checkpoints_have_none() -> None:
    assert read_quantisation({"hidden_size": 4}, {}) is None


@pytest.mark.parametrize(
    ("table", "method", "told"),
    [
        (FP8, "fp8", "fp8 in blocks of 128x128"),
        (INT4, "int4", "int4 in groups of 32"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "int4", "int4 in groups of 128"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4", "nvfp4"),
        ({"quant_method": "bitsandbytes"}, None, "bitsandbytes"),
    ],
)
def test_methods(table: dict[str, Any], method: str | None, told: str) -> None:
    found = look(table)
    assert (found.method, str(found)) == (method, told)


def test_scales_of_fp8_are_fp32_unless_the_config_says_powers_of_two() -> None:
    assert look(FP8).scales == "fp32"
    assert look(FP8 | {"scale_fmt": "ue8m0"}).scales == "pow2"
    assert look(INT4).scales is None


def test_layers_in_low_precision_are_seen_in_the_headers() -> None:
    found = look(
        FP8,
        **{
            "model.layers.0.mlp.up_proj.weight": "BF16",
            "model.layers.1.mlp.up_proj.weight": "F8_E4M3",
            "model.layers.1.mlp.up_proj.weight_scale_inv": "F32",
        },
    )
    assert found.low_precision_layers == {1}
    assert found.wrongly_quantised == ()


def test_a_packed_weight_is_one_of_low_precision_and_its_shape_is_not() -> None:
    names = {"model.layers.2.mlp.experts.0.up_proj.weight_packed": "I32"}
    assert look(INT4, **names).low_precision_layers == {2}
    assert look(INT4, **{"model.layers.2.mlp.up_proj.weight_shape": "I32"}).low_precision_layers == set()


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "lm_head.weight", "model.layers.3.mlp.gate.weight", "model.norm.weight"],
)
def test_tensors_that_must_stay_in_high_precision(name: str) -> None:
    assert look(FP8, **{name: "F8_E4M3"}).wrongly_quantised == (name,)
    assert look(FP8, **{name: "BF16"}).wrongly_quantised == ()


def test_the_gate_projection_of_a_dense_mlp_is_not_a_router() -> None:
    assert look(FP8, **{"model.layers.3.mlp.gate_proj.weight": "F8_E4M3"}).wrongly_quantised == ()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A whole checkpoint of the built-in architecture, with the built-in tokenizer."""
    directory = sort.build_assets(tmp_path / "assets", seed=0).checkpoint
    shapes = published_tensors(spec_from_hf_config(sort.model_config()))
    save_file({n: np.zeros(s, np.float32) for n, s in shapes.items()}, directory / "model.safetensors")
    return directory


def set_config(checkpoint: Path, **values: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_quantised_weights_are_those_of_the_config_or_not(checkpoint: Path, tmp_path: Path) -> None:
    """Scales beside weights are not unexpected tensors; other shapes and plain weights are."""
    quantised = tmp_path / "fp8"
    convert(plan_conversion(open_source(checkpoint), quantised, Wanted(NumberFormat("fp8"))))
    facts, _ = read_checkpoint(str(quantised))
    assert facts.quantisation is not None and facts.quantisation.method == "fp8"
    assert facts.shapes_problem == ""
    set_config(quantised, moe_intermediate_size=1024)
    assert "wrong shape" in read_checkpoint(str(quantised))[0].shapes_problem
    set_config(checkpoint, quantization_config=FP8)
    assert "plain, but config.json says fp8" in read_checkpoint(str(checkpoint))[0].shapes_problem
    set_config(checkpoint, quantization_config={"quant_method": "gptq", "bits": 4})
    assert read_checkpoint(str(checkpoint))[0].shapes_problem == ""


def test_what_the_trainer_starts_from_is_looked_at_too(tmp_path: Path) -> None:
    assert read_load_quantisation(None) is None and read_load_quantisation(str(tmp_path)) is None
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": INT4}))
    assert str(read_load_quantisation(str(tmp_path))) == "int4 in groups of 32"
    assert collect_facts(RunConfig(model={"load": str(tmp_path)})).load_quantisation is not None


def set_template(checkpoint: Path, source: str) -> None:
    (checkpoint / "chat_template.jinja").write_text(source)


SPECIAL_END = "{% for m in messages %}{{ m.content }}{{ END }}{% endfor %}"


def test_a_turn_that_ends_with_the_models_stop_token_is_fine(checkpoint: Path) -> None:
    tokens = json.loads((checkpoint / "tokenizer_config.json").read_text())
    set_template(checkpoint, SPECIAL_END.replace("END", f"'{tokens['eos_token']}'"))
    facts, _ = read_checkpoint(str(checkpoint))
    assert facts.has_chat_template
    assert facts.turn_end is None


def test_a_turn_that_ends_with_another_special_token_is_a_fact(checkpoint: Path) -> None:
    _, tokenizer = read_checkpoint(str(checkpoint))
    assert tokenizer is not None and tokenizer.eos_token_id is not None
    other = next(i for i in sorted(tokenizer.special_ids) if i != tokenizer.eos_token_id)
    text = tokenizer.decode([other])
    set_template(checkpoint, SPECIAL_END.replace("END", f"'{text}'"))
    facts, _ = read_checkpoint(str(checkpoint))
    assert facts.turn_end == (other, text)


def test_a_template_that_refuses_the_probe_says_nothing(checkpoint: Path) -> None:
    set_template(checkpoint, "{{ raise_exception('no') }}")
    facts, _ = read_checkpoint(str(checkpoint))
    assert facts.turn_end is None


def test_a_critic_starts_from_another_critic_or_from_a_language_model(tmp_path: Path) -> None:
    policy = spec_from_hf_config(sort.model_config())

    def problem_of(**changes: tuple[int, ...] | None) -> str:
        """Of the language model's tensors with some added, changed or left out."""
        shapes = published_tensors(policy) | {name.replace("__", "."): s for name, s in changes.items()}
        tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if shape is not None}
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(sort.model_config()))
        found = read_critic_facts(str(tmp_path), policy)
        assert found is not None
        return found.problem

    width = policy.hidden_size
    assert problem_of() == ""
    assert problem_of(score__weight=(1, width)) == ""
    assert "score.weight is [2, " in problem_of(score__weight=(2, width))
    assert "missing (1): model.norm.weight" in problem_of(model__norm__weight=None)
    (tmp_path / "model.safetensors").unlink()
    found = read_critic_facts(str(tmp_path), policy)
    assert found is not None and found.problem
    assert read_critic_facts(None, policy) is None
