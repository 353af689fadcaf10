"""Broken, foreign and unfit checkpoints are refused with the names, and leave nothing behind."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_support import EXPERT, change_config, converted, make_checkpoint
from safetensors.torch import load_file, save_file

from miles.arch.precision import NumberFormat
from miles.errors import CheckpointError, MilesError, Unavailable
from miles.weights.convert import Wanted, convert, open_source, plan_conversion
from miles.weights.convert.hashes import MANIFEST
from miles.weights.convert.reader import write_all


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "base")


def first_shard(directory: Path) -> Path:
    return min(directory.glob("*.safetensors"))


def change_tensors(path: Path, **changes: Any) -> None:
    """Set tensors of a file; None takes one away."""
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def assert_nothing_is_left(directory: Path) -> None:
    assert not [path.name for path in directory.iterdir() if "target" in path.name]


def test_a_config_that_is_not_of_these_weights(base: Path) -> None:
    change_config(base, moe_intermediate_size=96)
    with pytest.raises(CheckpointError, match=r"do not match config.json: wrong shape .*experts\.0\.gate"):
        open_source(base)
    change_config(base, moe_intermediate_size=64, num_experts=2)
    with pytest.raises(CheckpointError, match=r"unexpected \(6\): model.layers.0.mlp.experts.2"):
        open_source(base)
    change_config(base, num_experts=3, architectures=["SomethingNew"])
    with pytest.raises(CheckpointError, match="SomethingNew"):
        open_source(base)


def test_a_missing_shard(base: Path) -> None:
    first_shard(base).unlink()
    with pytest.raises(CheckpointError, match=r"shards are missing: model-00001-of"):
        open_source(base)


def test_a_truncated_shard(base: Path) -> None:
    path = first_shard(base)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=f"{path.name}: the file is truncated") as caught:
        open_source(base)
    assert "incomplete: model." in str(caught.value)


def test_a_shard_that_is_cut_after_it_was_planned(base: Path, tmp_path: Path) -> None:
    source = open_source(base)
    path = first_shard(base)
    path.write_bytes(path.read_bytes()[:-10])
    plan = plan_conversion(source, tmp_path / "target", Wanted(NumberFormat("fp32")))
    with pytest.raises(CheckpointError, match="the file ends inside model"):
        convert(plan)
    assert_nothing_is_left(tmp_path)


def test_a_name_that_nobody_maps(base: Path) -> None:
    path = first_shard(base)
    change_tensors(path, **{"model.layers.0.mystery.weight": torch.zeros(2)})
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.0.mystery.weight"] = path.name
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): model.layers.0.mystery.weight"):
        open_source(base)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_a_changed_byte_beside_a_manifest(base: Path, tmp_path: Path) -> None:
    converted(base, tmp_path / "copy", "bf16", max_shard_bytes=150_000)
    damaged = max((tmp_path / "copy").glob("*.safetensors"))
    flip_a_byte(damaged)
    with pytest.raises(CheckpointError, match=f"{damaged.name}: the file is corrupted"):
        converted(tmp_path / "copy", tmp_path / "target", "fp8")
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize("place", ["cache", "local-dir"])
def test_a_changed_byte_in_a_download(place: str, base: Path, tmp_path: Path) -> None:
    path = first_shard(base)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if place == "cache":
        (tmp_path / "blobs").mkdir()
        path.rename(tmp_path / "blobs" / digest)
        path.symlink_to(tmp_path / "blobs" / digest)
    else:
        metadata = base / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"commit\n{digest}\n0.0\n")
    converted(base, tmp_path / "good", "fp8")
    flip_a_byte(path)
    with pytest.raises(CheckpointError, match=f"{path.name}: the file is corrupted"):
        converted(base, tmp_path / "target", "fp8")


def test_numbers_that_a_format_does_not_hold(base: Path, tmp_path: Path) -> None:
    path = next(p for p in base.glob("*.safetensors") if EXPERT in load_file(p))
    weight = load_file(path)[EXPERT]
    weight[3, 5] = 1e5
    change_tensors(path, **{EXPERT: weight})
    with pytest.raises(CheckpointError, match=f"{EXPERT} has 1 numbers beyond fp16"):
        converted(base, tmp_path / "target", "fp16")
    weight[3, 5] = float("nan")
    change_tensors(path, **{EXPERT: weight})
    with pytest.raises(MilesError, match=f"{EXPERT} has infinities or NaN"):
        converted(base, tmp_path / "target", "int4")
    assert_nothing_is_left(tmp_path)


def test_groups_that_do_not_fill_rows(base: Path, tmp_path: Path) -> None:
    wanted = Wanted(NumberFormat("int4", group_size=48))
    with pytest.raises(CheckpointError, match=r"rows of 64 .* groups of 48: .*down_proj"):
        plan_conversion(open_source(base), tmp_path / "target", wanted)
    kept = Wanted(NumberFormat("int4", group_size=48), kept=("down_proj",))
    plan_conversion(open_source(base), tmp_path / "target", kept)


def test_a_target_that_exists(base: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with pytest.raises(CheckpointError, match="target: already exists"):
        plan_conversion(open_source(base), tmp_path / "target", Wanted(NumberFormat("fp8")))


def test_quantised_weights_and_their_table_must_agree(base: Path, tmp_path: Path) -> None:
    converted(base, tmp_path / "fp8", "fp8")
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    table = config["quantization_config"]
    cases = (
        ({}, "config.json has no quantization_config"),
        ({"quantization_config": table | {"weight_block_size": [64, 64]}}, "config.json does not explain"),
        ({"quantization_config": table | {"quant_method": "mxfp8"}}, "not in the format that config.json"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantised by gptq, which is not read",
        ),
    )
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    for changed, message in cases:
        (tmp_path / "fp8" / "config.json").write_text(json.dumps(plain | changed))
        with pytest.raises(CheckpointError, match=message):
            open_source(tmp_path / "fp8")
    change_config(base, quantization_config=table)
    with pytest.raises(CheckpointError, match=r"plain, but config\.json says fp8"):
        open_source(base)


def test_a_scale_that_is_not_there(base: Path, tmp_path: Path) -> None:
    converted(base, tmp_path / "fp8", "fp8")
    path = tmp_path / "fp8" / "model.safetensors"
    change_tensors(path, **{f"{EXPERT}_scale_inv": None})
    with pytest.raises(CheckpointError, match=f"F8_E4M3 without its scales: {EXPERT}"):
        open_source(tmp_path / "fp8")


def test_scales_of_activations_are_left_out_by_name(base: Path, tmp_path: Path) -> None:
    converted(base, tmp_path / "fp8", "fp8_tensor")
    (tmp_path / "fp8" / MANIFEST).unlink(missing_ok=True)
    scale = EXPERT.replace("weight", "input_scale")
    change_tensors(tmp_path / "fp8" / "model.safetensors", **{scale: torch.ones(1)})
    manifest = converted(tmp_path / "fp8", tmp_path / "target", "bf16")
    assert list(manifest["source"]["left_out"]) == [scale]


def test_a_disk_that_refuses(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_conversion(open_source(base), tmp_path / "target", Wanted(NumberFormat("fp8")))
    written = []

    def full(descriptor: int, offset: int, raw: torch.Tensor) -> None:
        written.append(offset)
        if len(written) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(descriptor, offset, raw)

    with monkeypatch.context() as patched:
        patched.setattr("miles.weights.convert.shard_file.write_all", full)
        with pytest.raises(CheckpointError, match="no space left on the disk") as caught:
            convert(plan, 1)
    assert ".target.partial" in str(caught.value)
    convert(plan)
    (tmp_path / "file").write_text("no directory")
    nowhere = plan_conversion(open_source(base), tmp_path / "file" / "target", Wanted(NumberFormat("fp8")))
    with pytest.raises(CheckpointError, match="the system refused: Not a directory"):
        convert(nowhere)


def test_a_disk_that_is_too_small_for_what_is_left(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier start wrote already does not count twice."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 100_000))
    wanted = Wanted(NumberFormat("fp8"))
    with pytest.raises(CheckpointError, match=r"target: the weights take [\d,]+ bytes, the disk has 100,000"):
        plan_conversion(open_source(base), tmp_path / "target", wanted)
    (tmp_path / ".target.partial").mkdir()
    (tmp_path / ".target.partial" / "shard").write_bytes(bytes(500_000))
    plan_conversion(open_source(base), tmp_path / "target", wanted)


@pytest.mark.parametrize("sign", ["latest_checkpointed_iteration.txt", "metadata.json"])
def test_a_checkpoint_of_megatron(sign: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / sign).write_text('{"sharded_backend": "torch_dist"}')
    with pytest.raises(
        Unavailable, match="source: a checkpoint of Megatron, which is read with the Megatron"
    ):
        open_source(tmp_path / "source")


def test_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no weights"):
        open_source(tmp_path / "empty")
