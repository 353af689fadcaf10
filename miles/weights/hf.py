"""Hugging Face checkpoints: the form in which weights enter and leave miles.

>>> load_published(decoder, read_hf("Qwen3-0.6B"))
>>> write_hf("out", decoder.spec, to_published(decoder), source_dir="Qwen3-0.6B")
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles.arch import ArchSpec, Dtype, check_shapes, to_hf_config, with_mtp_depth
from miles.arch.checkpoint import read_json
from miles.arch.hf_config import HF_DTYPE_NAMES
from miles.arch.quantization_config import KEYS
from miles.arch.safetensors_header import INDEX_FILE, SINGLE_FILE, read_headers
from miles.arch.tensor_roles import is_fp32_buffer
from miles.errors import CheckpointError
from miles.weights.atomic import staged_directory
from miles.weights.safetensors_io import read_tensors, stream_tensors

TORCH_DTYPES: dict[Dtype, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""What makes a checkpoint usable beside its weights and config.json; copied from the source checkpoint."""

MAX_SHARD_BYTES = 5_000_000_000


def read_hf(checkpoint_dir: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a checkpoint under published names, mapped from disk, one file after another.

    Raises `CheckpointError` before the first tensor when a shard is missing, truncated or damaged.
    """
    entries = read_headers(Path(checkpoint_dir))
    files = sorted({entry.file for entry in entries.values()})
    return ((name, tensor) for file in files for name, tensor in read_tensors(file))


def write_hf(
    directory: str | Path,
    spec: ArchSpec,
    tensors: Iterable[tuple[str, Tensor]],
    source_dir: str | Path | None = None,
    dtype: Dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    whole: bool = True,
) -> None:
    """Write a checkpoint that appears under `directory` whole or not at all.

    Args:
        tensors: all published tensors of `spec`; anything else is refused by name.
        source_dir: a checkpoint whose config.json, tokenizer and generation settings go along, and its
            weights of other parts than the decoder. Without it config.json is made from `spec`.
        dtype: the stored format (default: that of `spec`); router biases are fp32 in any.
        whole: False for some of the tensors, for a reader that has the others.

    Raises `CheckpointError` when `directory` exists, tensors are not those of `spec`, or the disk is full.
    """
    stored = dtype or spec.dtype
    with staged_directory(Path(directory)) as stage:
        if whole and source_dir is not None and spec.other_parts:
            tensors = chain(tensors, _other_parts(spec, source_dir))
        shapes = _write_shards(stage, tensors, TORCH_DTYPES[stored], max_shard_bytes)
        if whole:
            check_shapes(spec, shapes, where=str(directory))
        config = to_hf_config(spec) if source_dir is None else read_json(Path(source_dir) / "config.json")
        config = with_mtp_depth(config, spec.mtp_num_layers)
        # The weights are plain, whatever those of the source are.
        for key in ("dtype", *KEYS):
            config.pop(key, None)
        _write_json(stage / "config.json", config | {"torch_dtype": HF_DTYPE_NAMES[stored]})
        if source_dir is not None:
            copy_companions(Path(source_dir), stage)


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type in which a published tensor leaves a model of weights in `dtype`."""
    return torch.float32 if is_fp32_buffer(name) else dtype


def _other_parts(spec: ArchSpec, source_dir: str | Path) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in read_hf(source_dir) if name.startswith(spec.other_parts))


def copy_companions(source_dir: Path, directory: Path) -> None:
    """Copy the tokenizer and generation settings that `source_dir` has."""
    for name in COMPANION_FILES:
        if (source_dir / name).is_file():
            shutil.copyfile(source_dir / name, directory / name)


def _write_shards(
    stage: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, max_shard_bytes: int
) -> dict[str, tuple[int, ...]]:
    """Write the shards and their index; return the shape of every tensor written."""
    shapes: dict[str, tuple[int, ...]] = {}
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, dtype.itemsize, max_shard_bytes):
        forms = {name: (tensor.shape, stored_dtype(name, dtype)) for name, tensor in shard.items()}
        stream_tensors(stage / _shard_name(len(shards)), forms, shard.items())
        shards.append(list(shard))
        shapes |= {name: tuple(shape) for name, (shape, _) in forms.items()}
        total += sum(shape.numel() * stored.itemsize for shape, stored in forms.values())
    if not shards:
        stream_tensors(stage / SINGLE_FILE, {}, ())
        return shapes
    if len(shards) == 1:
        (stage / _shard_name(0)).rename(stage / SINGLE_FILE)
        return shapes
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        final = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (stage / _shard_name(index)).rename(stage / final)
        weight_map |= dict.fromkeys(names, final)
    _write_json(stage / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return shapes


def _shards(
    tensors: Iterable[tuple[str, Tensor]], itemsize: int, max_bytes: int
) -> Iterator[dict[str, Tensor]]:
    """Cut a stream of tensors into shards; a tensor larger than `max_bytes` gets a shard of its own."""
    shard: dict[str, Tensor] = {}
    seen: set[str] = set()
    size = 0
    for name, tensor in tensors:
        if name in seen:
            raise CheckpointError(f"{name} comes twice")
        seen.add(name)
        nbytes = tensor.numel() * itemsize
        if shard and size + nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += nbytes
    yield shard


def _shard_name(index: int) -> str:
    return f"shard-{index}.safetensors"


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
