"""Quantised checkpoints as others write them: what we dequantise is what their own library makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from convert_support import MOE, converted, make_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from miles.precision import fp8_block, mxfp8
from miles.precision.fp8_block import BlockFp8
from miles.weights.hf import read_hf

FP8, INT8 = {"num_bits": 8, "type": "float"}, {"num_bits": 8, "type": "int"}
FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
BLOCK = {"strategy": "block", "block_structure": [128, 128]}
GROUP = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8 by row": ("float-quantized", FP8 | {"strategy": "channel"}),
    "fp8 by matrix": ("float-quantized", FP8 | {"strategy": "tensor"}),
    "fp8 in blocks": ("float-quantized", FP8 | BLOCK),
    "mxfp8": ("mxfp8-quantized", FP8 | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}),
    "nvfp4": ("nvfp4-pack-quantized", FP4),
    "int8": ("int-quantized", INT8 | {"strategy": "channel"}),
    "int4": ("pack-quantized", GROUP),
    "int4 with zeros": ("pack-quantized", GROUP | {"symmetric": False}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("foreign") / "base", MOE | {"torch_dtype": "float32"})


def experts_replaced(base: Path, target: Path, table: dict[str, Any], make: Any) -> dict[str, Tensor]:
    """A checkpoint whose experts `make` stores: local tensors by their ending, and the weight they mean."""
    tensors, exact = {}, {}
    for name, weight in read_hf(base):
        if ".experts." not in name:
            tensors[name] = exact[name] = weight
            continue
        parts, exact[name] = make(weight.float())
        tensors |= {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
    target.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": table}))
    return exact


def scale_of(weight: Tensor, arguments: dict[str, Any]) -> Tensor:
    """A plausible scale: how it was chosen does not matter to a reader."""
    strategy, top = arguments["strategy"], {4: 7.0, 8: 448.0 if arguments["type"] == "float" else 127.0}
    size = weight.abs()
    if strategy == "tensor":
        return size.amax().view(1) / top[8]
    if strategy == "channel":
        return size.amax(1, keepdim=True) / top[8]
    if strategy == "block":
        padded = torch.zeros(-(-len(size) // 128) * 128, -(-size.shape[1] // 128) * 128)
        padded[: len(size), : size.shape[1]] = size
        return padded.view(padded.shape[0] // 128, 128, -1, 128).amax((1, 3)) / top[8]
    return size.view(len(size), -1, arguments["group_size"]).amax(-1) / top[arguments["num_bits"]]


@pytest.mark.parametrize("layout", COMPRESSED)
def test_what_compressed_tensors_wrote(layout: str, base: Path, tmp_path: Path) -> None:
    form, arguments = COMPRESSED[layout]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    library = BaseCompressor.get_value_from_registry(form)

    def make(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        state = {"weight": weight, "weight_scale": scale_of(weight, arguments)}
        if layout == "mxfp8":
            state["weight_scale"] = torch.exp2(state["weight_scale"].log2().ceil())
        if layout == "nvfp4":
            state["weight_global_scale"] = 448 * 6 / weight.abs().amax().view(1)
            scale = weight.abs().view(len(weight), -1, 16).amax(-1) / 6 * state["weight_global_scale"]
            state["weight_scale"] = scale.to(torch.float8_e4m3fn).float()
        if arguments.get("symmetric") is False:
            zeros = torch.arange(state["weight_scale"].numel()).view(state["weight_scale"].shape) % 16 - 8
            state["weight_zero_point"] = zeros.to(torch.int8)
        parts = library.compress(state, scheme)
        if "weight_packed" in parts and layout != "nvfp4":
            parts["weight_shape"] = torch.tensor(weight.shape)
        return dict(parts), library.decompress(parts, scheme)["weight"].float()

    groups = {"group_0": {"targets": ["Linear"], "weights": arguments}}
    table = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}
    exact = experts_replaced(base, tmp_path / "source", table, make)
    converted(tmp_path / "source", tmp_path / "target", "fp32")
    for name, tensor in read_hf(tmp_path / "target"):
        # The library multiplies NVFP4 in bf16; we do it in fp32.
        rtol = 2**-7 if layout == "nvfp4" else 1e-6
        torch.testing.assert_close(tensor, exact[name].float(), rtol=rtol, atol=0, msg=name)


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_block_scales_of_any_type(scales: torch.dtype, base: Path, tmp_path: Path) -> None:
    def make(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        stored = fp8_block.quantise(weight, "pow2")
        held = {"weight": stored.values, "weight_scale_inv": stored.scales.to(scales)}
        return held, fp8_block.dequantise(BlockFp8(stored.values, held["weight_scale_inv"].float()))

    table = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    exact = experts_replaced(base, tmp_path / "source", table, make)
    converted(tmp_path / "source", tmp_path / "target", "fp32")
    assert all(torch.equal(tensor, exact[name].float()) for name, tensor in read_hf(tmp_path / "target"))


def test_blocks_of_another_size_are_dequantised_and_rounded_again(base: Path, tmp_path: Path) -> None:
    """Also where there are as many of them as of ours: rows 0-95 and 96-191 instead of 0-127 and 128-191."""

    def make(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        stored = fp8_block.quantise(weight, block=(96, 96))
        return {"weight": stored.values, "weight_scale_inv": stored.scales}, fp8_block.dequantise(stored)

    table = {"quant_method": "fp8", "weight_block_size": [96, 96]}
    exact = experts_replaced(base, tmp_path / "source", table, make)
    manifest = converted(tmp_path / "source", tmp_path / "target", "fp8")
    assert {t["how"] for n, t in manifest["weights"].items() if ".experts." in n} == {"requantised"}
    held = dict(read_hf(tmp_path / "target"))
    for name, weight in exact.items():
        if ".experts." in name:
            wanted = fp8_block.quantise(weight)
            assert torch.equal(held[name].float(), wanted.values.float())
            assert torch.equal(held[f"{name}_scale_inv"], wanted.scales)


def test_exponents_under_their_own_type(base: Path, tmp_path: Path) -> None:
    def make(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        stored = mxfp8.quantise(weight)
        scales = stored.exponents.view(torch.float8_e8m0fnu)
        return {"weight": stored.values, "weight_scale_inv": scales}, mxfp8.dequantise(stored)

    exact = experts_replaced(base, tmp_path / "source", {"quant_method": "mxfp8"}, make)
    converted(tmp_path / "source", tmp_path / "target", "fp32")
    assert all(torch.equal(tensor, exact[name].float()) for name, tensor in read_hf(tmp_path / "target"))


def test_a_modelopt_checkpoint_with_its_table_in_a_file_of_its_own(base: Path, tmp_path: Path) -> None:
    def make(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale = weight.abs().amax() / 448
        values = (weight / scale).to(torch.float8_e4m3fn)
        parts = {"weight": values, "weight_scale": scale, "input_scale": torch.ones(())}
        return parts, values.float() * scale

    exact = experts_replaced(base, tmp_path / "source", {}, make)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    quantisation = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}}
    (tmp_path / "source" / "hf_quant_config.json").write_text(json.dumps(quantisation))
    manifest = converted(tmp_path / "source", tmp_path / "target", "fp32")
    assert all(torch.equal(tensor, exact[name].float()) for name, tensor in read_hf(tmp_path / "target"))
    assert len(manifest["source"]["left_out"]) == 18
