"""torch's distributed checkpoints: what we write, torch loads; what others write, in any shards, we read."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from convert_support import QUANTISED, converted, files_of, make_checkpoint, weights_of
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from miles.errors import CheckpointError
from miles.weights.convert import Wanted, convert, open_source, plan_conversion
from miles.weights.hf import copy_companions, read_hf

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "base")


def loaded(directory: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """What torch's own loader finds."""
    found = {name: torch.full_like(tensor, -1) for name, tensor in like.items()}
    dcp.load(found, checkpoint_id=directory, no_dist=True)
    return found


def saved_by_torch(
    base: Path, directory: Path, prefix: str = "", extra: dict | None = None
) -> dict[str, Tensor]:
    weights = dict(read_hf(base))
    dcp.save(
        {prefix + n: t for n, t in weights.items()} | (extra or {}), checkpoint_id=directory, no_dist=True
    )
    (directory / "config.json").write_bytes((base / "config.json").read_bytes())
    copy_companions(base, directory)
    return weights


def test_torch_loads_what_we_write(base: Path, tmp_path: Path) -> None:
    manifest = converted(base, tmp_path / "dcp", None, layout="dcp", max_shard_bytes=200_000)
    weights = dict(read_hf(base))
    found = loaded(tmp_path / "dcp", weights)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    assert len([name for name in manifest["files"] if name.endswith(".distcp")]) > 1
    assert {told["relative_error"] for told in manifest["weights"].values()} == {0}


def test_there_and_back_is_the_checkpoint_bit_for_bit(base: Path, tmp_path: Path) -> None:
    converted(base, tmp_path / "dcp", None, layout="dcp")
    converted(tmp_path / "dcp", tmp_path / "back", "bf16")
    converted(base, tmp_path / "copy", "bf16")
    back, copy = files_of(tmp_path / "back"), files_of(tmp_path / "copy")
    assert back.pop("miles_convert.json") != copy.pop("miles_convert.json")
    assert back == copy


@pytest.mark.parametrize("to", QUANTISED)
def test_quantised_weights_are_dequantised_on_the_way(to: str, base: Path, tmp_path: Path) -> None:
    converted(base, tmp_path / "quantised", to)  # type: ignore[arg-type]
    converted(tmp_path / "quantised", tmp_path / "dcp", None, layout="dcp", plain="fp32")
    exact = weights_of(tmp_path / "quantised")
    found = loaded(tmp_path / "dcp", exact)
    assert all(torch.equal(found[name], tensor) for name, tensor in exact.items())


@pytest.mark.parametrize("prefix", ["", "model.", "model_state.model."])
def test_what_torch_saved_is_read_under_any_prefix_without_the_optimizer(
    prefix: str, base: Path, tmp_path: Path
) -> None:
    names = [name for name, _ in read_hf(base)]
    moment = {f"optim.exp_avg.{name}": torch.ones(3) for name in names} | {"optim.lr": 0.1}
    weights = saved_by_torch(base, tmp_path / "dcp", prefix, moment)
    manifest = converted(tmp_path / "dcp", tmp_path / "target", "fp32")
    found = dict(read_hf(tmp_path / "target"))
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in weights.items())
    assert set(manifest["source"]["left_out"]) == set(moment)


def test_shards_of_several_ranks_are_put_together(base: Path, tmp_path: Path) -> None:
    """Rows and columns cut over ranks, as FSDP and tensor parallelism leave them."""
    directory = tmp_path / "dcp"
    weights = saved_by_torch(base, directory)
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    for name, dim in (("lm_head.weight", 0), ("model.embed_tokens.weight", 1)):
        cut_over_ranks(directory, metadata, name, weights[name], dim)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    found = loaded(directory, weights)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    converted(directory, tmp_path / "target", "bf16")
    found = dict(read_hf(tmp_path / "target"))
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def cut_over_ranks(directory: Path, metadata: Metadata, name: str, tensor: Tensor, dim: int) -> None:
    """Store a tensor as three uneven pieces in files of their own."""
    for index in [index for index in metadata.storage_data if index.fqn == name]:
        del metadata.storage_data[index]
    chunks, begin = [], 0
    for rank, part in enumerate(tensor.split((30, 30, tensor.shape[dim] - 60), dim)):
        offset = [0, 0]
        offset[dim] = begin
        begin += part.shape[dim]
        chunks.append(ChunkStorageMetadata(torch.Size(offset), part.shape))
        path = directory / f"__{rank + 1}_{dim}.distcp"
        torch.save(part.clone(), path)
        metadata.storage_data[MetadataIndex(name, offset, rank)] = _StorageInfo(
            path.name, 0, path.stat().st_size
        )
    properties = TensorProperties(dtype=tensor.dtype)
    metadata.state_dict_metadata[name] = TensorStorageMetadata(properties, tensor.shape, chunks)


def test_a_run_that_was_stopped_writes_only_the_files_that_are_missing(base: Path, tmp_path: Path) -> None:
    wanted = Wanted(layout="dcp", max_shard_bytes=100_000)

    def stop(done: int, total: int, file: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(plan_conversion(open_source(base), tmp_path / "target", wanted), 1, progress=stop)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / ".target.partial" / "files").iterdir()}
    convert(plan_conversion(open_source(base), tmp_path / "target", wanted))
    kept = [
        path for path, time in written.items() if (tmp_path / "target" / path.name).stat().st_mtime_ns == time
    ]
    assert len(kept) >= len(written) - 1 > 2
    convert(plan_conversion(open_source(base), tmp_path / "straight", wanted))
    assert files_of(tmp_path / "target") == files_of(tmp_path / "straight")


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("evil",)


def test_metadata_that_would_run_code_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved_by_torch(base, tmp_path / "dcp")
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"asks for posix.mkdir"):
        open_source(tmp_path / "dcp")
    assert not (tmp_path / "evil").exists()


def test_damaged_and_foreign_checkpoints_are_refused(base: Path, tmp_path: Path) -> None:
    directory = tmp_path / "dcp"
    saved_by_torch(base, directory)
    (file,) = directory.glob("*.distcp")
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=f"{file.name}: the file is truncated"):
        open_source(directory)
    file.write_bytes(bytes(1000) + content[1000:])
    with pytest.raises(CheckpointError, match=f"{file.name}: .* cannot be read"):
        converted(directory, tmp_path / "target", "fp32")
    file.unlink()
    with pytest.raises(CheckpointError, match=f"1 of 1 files are missing: {file.name}"):
        open_source(directory)
    (directory / ".metadata").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not the metadata of a distributed checkpoint"):
        open_source(directory)
    dcp.save({"some.name": torch.ones(2)}, checkpoint_id=tmp_path / "other", no_dist=True)
    with pytest.raises(CheckpointError, match=r"no key ends in model.embed_tokens.weight"):
        open_source(tmp_path / "other", config_dir=base)
    saved_by_torch(base, tmp_path / "more", extra={"model.mystery": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): model.mystery"):
        open_source(tmp_path / "more")
