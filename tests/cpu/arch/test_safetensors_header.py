"""Headers tell names, dtypes and shapes without reading weights, and show damage before training starts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from miles.arch import check_weights, published_tensors, spec_from_hf_config
from miles.arch.safetensors_header import INDEX_FILE, read_header, read_headers
from miles.arch.spec import ArchSpec
from miles.errors import CheckpointError


@pytest.fixture
def spec() -> ArchSpec:
    return spec_from_hf_config(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "vocab_size": 11,
            "hidden_size": 8,
            "intermediate_size": 12,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 4,
            "rope_theta": 1e4,
            "tie_word_embeddings": True,
        }
    )


@pytest.fixture
def arrays(spec: ArchSpec) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name, shape in published_tensors(spec).items()}


def save_sharded(directory: Path, arrays: dict[str, np.ndarray]) -> None:
    names = list(arrays)
    shards = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, held in shards.items():
        save_file({name: arrays[name] for name in held}, directory / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def test_a_header_gives_names_dtypes_shapes_and_sizes(tmp_path: Path) -> None:
    save_file({"x": np.zeros((3, 5), np.float16), "n": np.zeros((), np.int64)}, tmp_path / "f.safetensors")
    entries = read_header(tmp_path / "f.safetensors")
    assert (entries["x"].dtype, entries["x"].shape, entries["x"].nbytes) == ("F16", (3, 5), 30)
    assert (entries["n"].dtype, entries["n"].shape, entries["n"].numel) == ("I64", (), 1)


@pytest.mark.parametrize("sharded", [False, True])
def test_matching_weights_are_accepted(tmp_path: Path, spec: ArchSpec, arrays: dict, sharded: bool) -> None:
    if sharded:
        save_sharded(tmp_path, arrays)
    else:
        save_file(arrays, tmp_path / "model.safetensors")
    assert check_weights(spec, tmp_path).keys() == arrays.keys()


def test_missing_unexpected_and_misshapen_tensors_are_all_named(
    tmp_path: Path, spec: ArchSpec, arrays: dict
) -> None:
    del arrays["model.norm.weight"]
    arrays["model.extra"] = np.zeros(1, np.float32)
    arrays["model.layers.0.mlp.up_proj.weight"] = np.zeros((13, 8), np.float32)
    save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        check_weights(spec, tmp_path)
    message = str(error.value)
    assert "missing (1): model.norm.weight" in message
    assert "unexpected (1): model.extra" in message
    assert "model.layers.0.mlp.up_proj.weight is [13, 8], config.json gives [12, 8]" in message


def test_a_tied_model_may_ship_its_head_twice(tmp_path: Path, spec: ArchSpec, arrays: dict) -> None:
    save_file(arrays | {"lm_head.weight": np.zeros((11, 8), np.float32)}, tmp_path / "model.safetensors")
    check_weights(spec, tmp_path)


def test_missing_shards_are_named(tmp_path: Path, arrays: dict) -> None:
    save_sharded(tmp_path, arrays)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 shards are missing: b\.safetensors"):
        read_headers(tmp_path)


def test_a_tensor_that_the_index_promises_and_no_shard_holds_is_named(tmp_path: Path, arrays: dict) -> None:
    save_sharded(tmp_path, arrays)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    index["weight_map"]["model.ghost"] = "a.safetensors"
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.ghost"):
        read_headers(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 40, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, arrays: dict, keep: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file(arrays, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*truncated"):
        read_headers(tmp_path)


def test_trailing_bytes_are_refused(tmp_path: Path, arrays: dict) -> None:
    path = tmp_path / "model.safetensors"
    save_file(arrays, path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="longer than its header says"):
        read_headers(tmp_path)


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"PK\x03\x04 a zip archive, of sufficient length")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_headers(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        read_headers(tmp_path)
