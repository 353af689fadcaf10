"""Checkpoints on disk: what is written reads back, damage is refused, nothing appears half-written."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from miles.arch import load_spec
from miles.errors import CheckpointError
from miles.weights.atomic import staged_directory
from miles.weights.hf import read_hf, write_hf
from miles.weights.native_map import to_published
from miles.weights.safetensors_io import read_tensors, write_tensors


@pytest.mark.parametrize("max_shard_bytes", [1_000, 10**9])
def test_what_is_written_reads_back(tmp_path: Path, make_decoder: Callable, max_shard_bytes: int) -> None:
    decoder = make_decoder()
    write_hf(tmp_path / "out", decoder.spec, to_published(decoder), max_shard_bytes=max_shard_bytes)
    assert load_spec(tmp_path / "out") == decoder.spec
    restored, expected = dict(read_hf(tmp_path / "out")), dict(to_published(decoder))
    assert restored.keys() == expected.keys()
    assert all(torch.equal(restored[name], expected[name]) for name in expected)
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert bool(shards) == (max_shard_bytes == 1_000)
    tensor_bytes = max(tensor.nbytes for tensor in expected.values())
    assert all(shard.stat().st_size < max(1_000, tensor_bytes) + 4_000 for shard in shards)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_stored_dtype_can_differ_and_config_says_so(tmp_path: Path, make_decoder: Callable) -> None:
    decoder = make_decoder()
    write_hf(tmp_path / "out", decoder.spec, to_published(decoder), dtype="bf16")
    assert load_spec(tmp_path / "out").dtype == "bf16"
    restored = dict(read_hf(tmp_path / "out"))
    assert torch.equal(restored["model.embed_tokens.weight"], decoder.embed.bfloat16())


def test_config_tokenizer_and_generation_settings_go_along(tmp_path: Path, make_decoder: Callable) -> None:
    decoder = make_decoder()
    source = tmp_path / "source"
    write_hf(source, decoder.spec, to_published(decoder))
    config = json.loads((source / "config.json").read_text()) | {
        "transformers_version": "4.51.0",
        "dtype": "float32",
        "quantization_config": {"quant_method": "compressed-tensors"},
    }
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    write_hf(tmp_path / "out", decoder.spec, to_published(decoder), source_dir=source, dtype="bf16")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["transformers_version"] == "4.51.0"
    assert (written["torch_dtype"], "dtype" in written) == ("bfloat16", False)
    assert "quantization_config" not in written, "what is written is plain"
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert load_spec(tmp_path / "out").eos_token_ids == (2, 7)


def test_an_incomplete_set_of_tensors_is_refused_and_leaves_nothing(
    tmp_path: Path, make_decoder: Callable
) -> None:
    decoder = make_decoder()
    items = [item for item in to_published(decoder) if item[0] != "lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"missing \(1\): lm_head.weight"):
        write_hf(tmp_path / "out", decoder.spec, items)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight comes twice"):
        write_hf(tmp_path / "out", decoder.spec, 2 * [*to_published(decoder)][-1:], max_shard_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_shard_is_refused_before_the_first_tensor(tmp_path: Path, make_decoder: Callable) -> None:
    decoder = make_decoder()
    write_hf(tmp_path / "out", decoder.spec, to_published(decoder), max_shard_bytes=3_000)
    last = sorted((tmp_path / "out").glob("model-*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=rf"{last.name}: the file is truncated"):
        read_hf(tmp_path / "out")
    last.unlink()
    with pytest.raises(CheckpointError, match=f"shards are missing: {last.name}"):
        read_hf(tmp_path / "out")


def test_an_existing_directory_is_never_overwritten(tmp_path: Path, make_decoder: Callable) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    decoder = make_decoder()
    with pytest.raises(CheckpointError, match="already exists"):
        write_hf(tmp_path / "out", decoder.spec, to_published(decoder))
    assert (tmp_path / "out" / "precious").read_text() == "data"


def test_a_file_written_by_miles_is_read_by_safetensors_and_back(tmp_path: Path) -> None:
    tensors = {
        "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "transposed": torch.randn(4, 3).t(),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.empty(0, 2),
    }
    size = write_tensors(tmp_path / "f.safetensors", tensors)
    assert size == (tmp_path / "f.safetensors").stat().st_size
    for restored in (load_file(tmp_path / "f.safetensors"), dict(read_tensors(tmp_path / "f.safetensors"))):
        assert restored.keys() == tensors.keys()
        assert all(torch.equal(restored[name], tensors[name]) for name in tensors)
        assert all(restored[name].dtype == tensors[name].dtype for name in tensors)


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged_directory(tmp_path / "out") as stage:
        (stage / "half").write_text("written")
        raise RuntimeError("killed here")
    assert list(tmp_path.iterdir()) == []
    with staged_directory(tmp_path / "out") as stage:
        (stage / "file").write_text("whole")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "file").read_text() == "whole"


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no space left"), staged_directory(tmp_path / "out") as stage:
        (stage / "half").write_text("written")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []
