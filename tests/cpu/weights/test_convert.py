"""From any format to any other: what is written, what it stands for, and what the manifest says of it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convert_support import DENSE, EXPERT, QUANTISED, converted, files_of, make_checkpoint, weights_of
from safetensors.torch import save_file

from miles.arch import load_spec, published_tensors
from miles.arch.precision import FormatName, NumberFormat
from miles.arch.safetensors_header import TensorEntry
from miles.arch.specs import shipped_names, shipped_spec
from miles.arch.stored_weights import StoredWeight
from miles.planning.formats import QUANTISED as PLANNED
from miles.planning.formats import Format, bytes_per_weight
from miles.precision import nvfp4
from miles.precision.weight_format import dequantised, quantised
from miles.weights.convert import (
    Wanted,
    check_of_logits,
    convert,
    open_source,
    plan_conversion,
    strips,
)
from miles.weights.convert.moves import move
from miles.weights.convert.shards import form_bytes
from miles.weights.hf import read_hf


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("convert") / "base")


@pytest.fixture(scope="module")
def exact(base: Path) -> dict[str, torch.Tensor]:
    return weights_of(base)


@pytest.mark.parametrize("to", QUANTISED)
def test_quantised_weights_are_those_of_the_format_and_the_rest_is_copied(
    to: str, base: Path, exact: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    manifest = converted(base, tmp_path / "target", to)  # type: ignore[arg-type]
    found = weights_of(tmp_path / "target")
    assert found.keys() == exact.keys()
    for name, weight in exact.items():
        told = manifest["weights"][name]
        four_bits = to in ("int4", "nvfp4")
        rounded = ".experts." in name or (not four_bits and "_proj" in name)
        assert (told["how"] == "quantised") == rounded, name
        if not rounded:
            assert told["relative_error"] == 0
            assert torch.equal(found[name], weight)
        elif to != "nvfp4":
            assert torch.equal(found[name], dequantised(quantised(NumberFormat(to), weight))), name  # type: ignore[arg-type]
        if rounded:
            off = float((found[name] - weight).norm() / weight.norm())
            assert told["relative_error"] == pytest.approx(off, rel=1e-3)
            assert told["max_error"] == pytest.approx(float((found[name] - weight).abs().max()))
    assert (tmp_path / "target" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("to", PLANNED)
def test_weights_take_the_bytes_that_memory_is_planned_with(to: Format, base: Path, tmp_path: Path) -> None:
    plan = plan_conversion(open_source(base), tmp_path / "target", Wanted(NumberFormat(to)))
    experts = [one for one in plan.moves if ".experts." in one.name]
    held = sum(form_bytes(one) for one in experts) / sum(one.numel for one in experts)
    assert held == pytest.approx(bytes_per_weight(to), rel=0.01)


def test_nvfp4_matrices_that_are_multiplied_as_one_share_their_outer_scale(
    base: Path, exact: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    converted(base, tmp_path / "target", "nvfp4")
    held = dict(read_hf(tmp_path / "target"))
    gate = EXPERT.replace("up", "gate")
    outer = nvfp4.outer_scale(exact[EXPERT], exact[gate])
    assert held[f"{EXPERT}_scale_2"] == held[f"{gate}_scale_2"] == outer
    assert torch.equal(
        weights_of(tmp_path / "target")[EXPERT], nvfp4.dequantise(nvfp4.quantise(exact[EXPERT], outer))
    )


@pytest.mark.parametrize("to", QUANTISED)
def test_the_way_back_dequantises_by_the_same_format(to: str, base: Path, tmp_path: Path) -> None:
    converted(base, tmp_path / "there", to)  # type: ignore[arg-type]
    exact = weights_of(tmp_path / "there")
    converted(tmp_path / "there", tmp_path / "wide", "fp32")
    back = dict(read_hf(tmp_path / "wide"))
    assert all(torch.equal(back[name], weight) for name, weight in exact.items())
    converted(tmp_path / "there", tmp_path / "back", "bf16")
    back = dict(read_hf(tmp_path / "back"))
    assert all(torch.equal(back[name], weight.bfloat16()) for name, weight in exact.items())
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


@pytest.mark.parametrize("to", QUANTISED)
def test_weights_in_the_wanted_format_are_copied_bit_for_bit(to: str, base: Path, tmp_path: Path) -> None:
    converted(base, tmp_path / "once", to)  # type: ignore[arg-type]
    manifest = converted(tmp_path / "once", tmp_path / "twice", to)  # type: ignore[arg-type]
    assert {told["how"] for told in manifest["weights"].values()} == {"copied"}
    once, twice = files_of(tmp_path / "once"), files_of(tmp_path / "twice")
    assert once.pop("miles_convert.json") != twice.pop("miles_convert.json")
    assert once == twice


def test_a_scale_convention_that_differs_is_rounded_again(base: Path, tmp_path: Path) -> None:
    converted(base, tmp_path / "fp32", "fp8")
    manifest = converted(tmp_path / "fp32", tmp_path / "pow2", NumberFormat("fp8", "pow2"))
    assert manifest["weights"][EXPERT]["how"] == "requantised"
    held = dict(read_hf(tmp_path / "pow2"))[f"{EXPERT}_scale_inv"]
    assert (torch.frexp(held).mantissa == 0.5).all()
    table = json.loads((tmp_path / "pow2" / "config.json").read_text())["quantization_config"]
    assert table["scale_fmt"] == "ue8m0"


def test_exceptions_of_the_policy_are_kept_and_written_down(base: Path, tmp_path: Path) -> None:
    manifest = converted(base, tmp_path / "target", "fp8", last_layers=1, kept=("q_proj",))
    quantised_names = {name for name, told in manifest["weights"].items() if told["how"] == "quantised"}
    assert quantised_names
    assert not any("layers.1." in name or "q_proj" in name for name in quantised_names)
    assert manifest["weights"]["model.layers.1.self_attn.k_proj.weight"]["why"] == "in the last 1 layers"
    table = json.loads((tmp_path / "target" / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.self_attn.q_proj" in table["modules_to_not_convert"]
    assert "model.layers.1.mlp.experts" in table["modules_to_not_convert"]


def test_plain_numbers_of_another_type_stay_beside_quantised_ones(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", shard_bytes=10_000_000)
    norm = "model.layers.0.input_layernorm.weight"
    tensors = dict(read_hf(base))
    save_file(tensors | {norm: tensors[norm].float() + 1e-4}, base / "model.safetensors")
    manifest = converted(base, tmp_path / "fp8", "fp8")
    assert manifest["weights"][norm]["how"] == "copied"
    assert dict(read_hf(tmp_path / "fp8"))[norm].dtype == torch.float32
    manifest = converted(base, tmp_path / "bf16", "bf16")
    assert manifest["weights"][norm]["how"] == "cast"
    assert manifest["weights"][norm]["relative_error"] > 0


def test_plain_numbers_beside_quantised_ones_get_the_type_that_is_asked_for(
    base: Path, tmp_path: Path
) -> None:
    converted(base, tmp_path / "target", "int8", plain="fp32")
    held = dict(read_hf(tmp_path / "target"))
    assert held["lm_head.weight"].dtype == torch.float32 and held[EXPERT].dtype == torch.int8
    assert json.loads((tmp_path / "target" / "config.json").read_text())["torch_dtype"] == "float32"


def test_files_are_cut_where_they_are_full_and_every_byte_is_accounted_for(
    base: Path, exact: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    source = open_source(base)
    plan = plan_conversion(source, tmp_path / "target", Wanted(NumberFormat("bf16"), max_shard_bytes=70_000))
    manifest = convert(plan, workers=2)
    index = json.loads((tmp_path / "target" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(exact)
    assert index["metadata"]["total_size"] == plan.bytes_in == sum(2 * w.numel() for w in exact.values())
    assert len(plan.shards) > 5
    for name, told in manifest["files"].items():
        content = (tmp_path / "target" / name).read_bytes()
        assert told == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for path in base.glob("*.safetensors"):
        told = manifest["source"]["files"][path.name]
        assert told["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert all(torch.equal(tensor.float(), exact[name]) for name, tensor in read_hf(tmp_path / "target"))


def test_no_file_stays_open_afterwards(base: Path, tmp_path: Path) -> None:
    plan = plan_conversion(open_source(base), tmp_path / "target", Wanted(NumberFormat("fp8")))
    convert(plan, check=check_of_logits(plan))
    held = {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}
    assert not {path for path in held if path.startswith((str(base), str(tmp_path)))}


def test_results_do_not_depend_on_the_number_of_workers(base: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        plan = plan_conversion(open_source(base), tmp_path / str(workers), Wanted(NumberFormat("int4")))
        convert(plan, workers)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")


@pytest.mark.parametrize(
    "wanted", [*map(NumberFormat, QUANTISED), NumberFormat("int4", symmetric=False)], ids=str
)
def test_strips_of_rows_make_the_same_bytes_as_the_whole(
    wanted: NumberFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There and back, and from one format to another; rows (352, 162) that fill neither strips nor words."""
    other: FormatName = "fp8" if wanted.name == "int8" else "int8"
    heads = {"num_attention_heads": 144, "num_key_value_heads": 9, "head_dim": 18}
    make_checkpoint(tmp_path / "base", DENSE | {"intermediate_size": 352} | heads)
    for folder, numbers in (("whole", 1 << 24), ("strips", 1)):
        monkeypatch.setattr(strips, "STRIP_NUMBERS", numbers)
        converted(tmp_path / "base", tmp_path / folder / "there", wanted)
        converted(tmp_path / "whole" / "there", tmp_path / folder / "back", "fp32")
        converted(tmp_path / "whole" / "there", tmp_path / folder / "other", other)
    for name in ("there", "back", "other"):
        whole, cut = (files_of(tmp_path / folder / name) for folder in ("whole", "strips"))
        assert whole["model.safetensors"] == cut["model.safetensors"], name


def test_a_dense_model_is_quantised_whole_also_in_four_bits(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "base", DENSE)
    manifest = converted(tmp_path / "base", tmp_path / "target", "nvfp4")
    q, k, v = (
        dict(read_hf(tmp_path / "target"))[f"model.layers.0.self_attn.{c}_proj.weight_scale_2"] for c in "qkv"
    )
    assert q == k == v
    assert manifest["weights"]["model.layers.1.mlp.down_proj.weight"]["how"] == "quantised"


@pytest.mark.parametrize("model", shipped_names())
def test_public_models_fit_every_format(model: str) -> None:
    """Rows are whole groups."""
    spec = shipped_spec(model)
    spec = replace(spec, layers=(spec.layers[0], spec.layers[-1]))
    entry = TensorEntry("any", "BF16", (1, 1), Path("any"), 2)
    for to in QUANTISED:
        wanted = Wanted(NumberFormat(to))
        policy = wanted.policy(spec)
        assert policy is not None
        for name, shape in published_tensors(policy.layout(spec)).items():
            weight = StoredWeight(name, shape, NumberFormat("bf16"), {name: entry})
            assert not move(weight, wanted, policy, spec).unfit, name


def test_a_step_of_a_run_is_a_source(base: Path, tmp_path: Path) -> None:
    trainer = tmp_path / "step-000020" / "trainer"
    trainer.mkdir(parents=True)
    (trainer / "trainer_state.json").write_text("{}")
    converted(base, trainer / "model", "fp32")
    for name, source in (("one", trainer.parent), ("two", trainer)):
        converted(source, tmp_path / name, "bf16")
        assert load_spec(tmp_path / name) == load_spec(base)
