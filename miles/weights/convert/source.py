"""A checkpoint that is converted: what it holds, checked against its config.json, and who reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from miles.arch import ArchSpec, check_shapes, load_spec, published_tensors
from miles.arch.checkpoint import read_json
from miles.arch.expert_layout import held_spec
from miles.arch.safetensors_header import TensorEntry, read_headers
from miles.arch.stored_weights import StoredWeight, StoredWeights, stored_weights
from miles.errors import CheckpointError, Unavailable
from miles.weights.convert.dcp_read import DcpContents, read_dcp
from miles.weights.convert.dcp_write import METADATA_FILE
from miles.weights.convert.reader import Reader, SafetensorsReader
from miles.weights.convert.run_state import RunState, state_of_step

_MEGATRON_FILES = ("latest_checkpointed_iteration.txt", "common.pt")
MODELOPT_FILE = "hf_quant_config.json"
"""Where ModelOpt wrote what it quantised before config.json had a place for it."""


@dataclass(frozen=True)
class Source:
    """A whole checkpoint under published names."""

    directory: Path
    config_dir: Path
    """Where config.json, tokenizer and generation settings are."""
    config: Mapping[str, Any]
    spec: ArchSpec
    """The model as its family publishes it; experts may be stored in another layout."""
    stored: StoredWeights
    files: tuple[Path, ...]
    """The files with weights, sorted."""
    reader: Reader
    state: RunState
    """What a run needs beside the weights to go on."""

    @property
    def weights(self) -> Mapping[str, StoredWeight]:
        """In the order in which the files hold them."""
        return self.stored.weights

    @property
    def num_tensors(self) -> int:
        parts = sum(len(weight.parts) for weight in self.weights.values())
        return parts + len(self.state.moments) + len(self.stored.left_out)


def open_source(directory: Path, config_dir: Path | None = None) -> Source:
    """Read config.json and the headers of a checkpoint of any kind that is converted from.

    Args:
        directory: a Hugging Face checkpoint, or a step of a run's `checkpoints/`.
        config_dir: the checkpoint with config.json and tokenizer, where `directory` has none.

    Raises CheckpointError with names: a missing or damaged file, an unknown model, weights that are not those
    of config.json. Raises Unavailable for a checkpoint of Megatron.
    """
    if not directory.is_dir():
        what = "a file, not a checkpoint's directory" if directory.exists() else "no such directory"
        raise CheckpointError(what, where=str(directory), fix="name a checkpoint's directory")
    refuse_megatron(directory)
    if (directory / METADATA_FILE).is_file():
        spec = load_spec(config_dir or directory)
        return _checked(directory, config_dir or directory, read_dcp(directory, spec))
    return _checked(directory, config_dir or model_directory(directory), _read_safetensors(directory))


def refuse_megatron(directory: Path) -> None:
    """Unavailable for a checkpoint of Megatron: its tensors have Megatron's names and shards."""
    if is_megatron(directory):
        raise Unavailable(
            "a checkpoint of Megatron, which is read with the Megatron trainer",
            where=str(directory),
            fix="make a Hugging Face checkpoint of it first: miles convert SOURCE TARGET",
        )


def is_megatron(directory: Path) -> bool:
    """Whether a directory holds a checkpoint of Megatron, or names the newest of several."""
    described = directory / "metadata.json"
    named = described.is_file() and "sharded_backend" in read_json(described)
    return named or any((directory / name).is_file() for name in _MEGATRON_FILES)


def model_directory(directory: Path) -> Path:
    """The model inside a step of a run's checkpoints, or inside a trainer's part of one; else the same."""
    for inside in (directory / "trainer" / "model", directory / "model"):
        if (inside.parent / "trainer_state.json").is_file():
            return inside
    return directory


@dataclass(frozen=True)
class _Safetensors:
    """The same as `DcpContents`, of a checkpoint in safetensors."""

    entries: Mapping[str, TensorEntry]
    state: RunState
    files: tuple[Path, ...]
    reader: Reader
    left_out: Mapping[str, str] = field(default_factory=dict)


def _read_safetensors(directory: Path) -> _Safetensors:
    entries = read_headers(model_directory(directory))
    is_step = (directory / "trainer" / "trainer_state.json").is_file()
    state = state_of_step(directory) if is_step else RunState()
    files = {entry.file for entry in entries.values()} | state.tensor_files
    return _Safetensors(entries, state, tuple(sorted(files)), SafetensorsReader())


def _checked(directory: Path, config_dir: Path, held: _Safetensors | DcpContents) -> Source:
    """A source whose tensors are the ones that config.json gives. Raises CheckpointError with the names."""
    spec = load_spec(config_dir)
    config = _with_modelopt(read_json(config_dir / "config.json"), config_dir)
    ordered = dict(sorted(held.entries.items(), key=lambda item: (item[1].file, item[1].offset)))
    where = str(directory)
    held_as = held_spec(spec, ordered)
    stored = stored_weights(ordered, config, published_tensors(held_as), where)
    check_shapes(held_as, {name: weight.shape for name, weight in stored.weights.items()}, where)
    stored = replace(stored, left_out={**stored.left_out, **held.left_out})
    return Source(directory, config_dir, config, spec, stored, held.files, held.reader, held.state)


def _with_modelopt(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    path = directory / MODELOPT_FILE
    if "quantization_config" in config or not path.is_file():
        return config
    table = read_json(path).get("quantization")
    return config | {"quantization_config": {"quant_method": "modelopt"} | (table or {})}
