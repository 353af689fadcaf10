"""Reading torch's distributed checkpoints (DCP): whoever wrote them, with whatever sharding.

`.metadata` is a pickle, and a pickle can run code: only the classes that describe a checkpoint are built from
it. Tensors are read with `weights_only`.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from miles.arch import ArchSpec, published_tensors
from miles.arch.expert_layout import Cut
from miles.arch.safetensors_header import TensorEntry
from miles.errors import CheckpointError
from miles.weights.convert.dcp_write import METADATA_FILE
from miles.weights.convert.file_part import FilePart
from miles.weights.convert.reader import PIECE_BYTES
from miles.weights.convert.run_state import PREFIX, STATE_DIR, RunState, state_of_dcp
from miles.weights.safetensors_io import DTYPES
from miles.weights.stacked_experts import matrix_of

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_SAFE = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


class DcpReader:
    """Tensors put together from the pieces that ranks wrote. Implements `Reader`."""

    has_rows = False

    def __init__(self, directory: Path, metadata: Metadata, keys: Mapping[str, str]) -> None:
        """`keys`: those of the weights by published name; other tensors are read under their own."""
        self._directory, self._metadata, self._keys = directory, metadata, keys
        self._stack: tuple[str, Tensor] | None = None
        self._guard = threading.Lock()
        self._places: dict[str, list[tuple[Any, Any]]] = {}
        for index, info in metadata.storage_data.items():
            self._places.setdefault(index.fqn, []).append((index, info))

    def read(self, entry: TensorEntry) -> Tensor:
        key = self._keys.get(entry.name, entry.name)
        places, sizes = self._places[key], _chunk_sizes(self._metadata, key)
        whole: Tensor | None = None
        for index, info in places:
            part = self._load(info, entry)
            offset = tuple(index.offset or (0,) * len(entry.shape))
            if tuple(part.shape) != sizes.get(offset) or part.dtype != DTYPES[entry.dtype]:
                raise _damaged(self._directory / info.relative_path, entry.name)
            if tuple(part.shape) == entry.shape:
                return part.contiguous()
            if whole is None:
                whole = torch.empty(entry.shape, dtype=part.dtype)
            whole[tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))] = part
        assert whole is not None
        return whole

    def columns(self, entry: TensorEntry, cut: Cut) -> Tensor:
        """A stacked tensor is read once for all the matrices in it, which come one after another."""
        with self._guard:
            if self._stack is None or self._stack[0] != entry.name:
                self._stack = None
                self._stack = entry.name, self.read(entry)
            whole = self._stack[1]
        return matrix_of(whole, cut)

    def pieces(self, entry: TensorEntry) -> Iterator[Tensor]:
        flat = self.read(entry).reshape(-1)
        return iter(flat.split(max(PIECE_BYTES // flat.element_size(), 1)))

    def close(self) -> None:
        """Files are open only while they are read."""

    def _load(self, info: Any, entry: TensorEntry) -> Tensor:
        path = self._directory / info.relative_path
        with path.open("rb") as file:
            try:
                part = torch.load(
                    FilePart(file, info.offset, info.length), map_location="cpu", weights_only=True
                )
            except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
                raise _damaged(path, entry.name) from error
        if not isinstance(part, Tensor):
            raise _damaged(path, entry.name)
        return part


@dataclass(frozen=True)
class DcpContents:
    """A distributed checkpoint as `.metadata` describes it."""

    entries: Mapping[str, TensorEntry]
    """Weights by published name."""
    state: RunState
    left_out: Mapping[str, str]
    """Keys of neither, with the reason."""
    files: tuple[Path, ...]
    reader: DcpReader


def read_dcp(directory: Path, spec: ArchSpec) -> DcpContents:
    """What a directory holds.

    Keys may all stand under one prefix (`model.` or `app.model.`), which is found by the embedding's name;
    what stands elsewhere, as an optimizer's state does, is left out. Raises CheckpointError for files that
    are missing or cut short, tensors with gaps, and metadata that is none.
    """
    metadata = _metadata(directory / METADATA_FILE)
    keys, left_out = _published_keys(metadata, spec, directory)
    reader = DcpReader(directory, metadata, keys)
    entries = {name: _entry(directory, metadata, reader, name, key) for name, key in keys.items()}
    others = {
        key: _entry(directory, metadata, reader, key, key) for key in left_out if key.startswith(PREFIX)
    }
    state = state_of_dcp(directory, others if (directory / STATE_DIR).is_dir() else {})
    left_out = {key: why for key, why in left_out.items() if key not in state.moments}
    wanted = {*keys.values(), *state.moments}
    named = {i.relative_path for index, i in metadata.storage_data.items() if index.fqn in wanted}
    files = tuple(sorted(directory / name for name in named))
    _check_files(files, directory, metadata)
    return DcpContents(entries, state, left_out, files, reader)


def _metadata(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            found = _SafeUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"not the metadata of a distributed checkpoint: {error}", where=str(path)
        ) from error
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
        raise CheckpointError("not the metadata of a distributed checkpoint", where=str(path))
    return found


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _SAFE or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise CheckpointError(
            f"the metadata asks for {module}.{name}, which describes no checkpoint",
            where=METADATA_FILE,
            why="a pickle can run code: nothing else is built from it",
            fix="take checkpoints from those you trust, or save it again with torch.distributed.checkpoint",
        )


def _published_keys(
    metadata: Metadata, spec: ArchSpec, directory: Path
) -> tuple[dict[str, str], dict[str, str]]:
    """Key of each published name, and the keys that are left out with the reason."""
    names = published_tensors(spec)
    anchor = next(iter(names))
    prefixes = {key.removesuffix(anchor) for key in metadata.state_dict_metadata if key.endswith(anchor)}
    if not prefixes:
        raise CheckpointError(
            f"no key ends in {anchor}: the tensors are not under published names",
            where=str(directory),
            why=f"keys: {', '.join(list(metadata.state_dict_metadata)[:5])} …",
        )

    def unlikely(prefix: str) -> tuple[int, bool, int]:
        """Moments of an optimizer stand under the same names, so that their prefixes are as complete."""
        found = sum(prefix + name in metadata.state_dict_metadata for name in names)
        return -found, "optim" in prefix or "exp_avg" in prefix, len(prefix)

    own = min(prefixes, key=unlikely)
    others = tuple(prefix for prefix in prefixes if prefix != own)
    keys, left_out = {}, {}
    for key, stored in metadata.state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata):
            left_out[key] = "no tensor"
        elif not key.startswith(own) or (others and key.startswith(others)):
            left_out[key] = "no weight of the model"
        else:
            keys[key.removeprefix(own)] = key
    return keys, left_out


def _entry(directory: Path, metadata: Metadata, reader: DcpReader, name: str, key: str) -> TensorEntry:
    stored = metadata.state_dict_metadata[key]
    assert isinstance(stored, TensorStorageMetadata)
    dtype, shape = stored.properties.dtype, tuple(stored.size)
    places = reader._places.get(key, [])
    held = sum(chunk.sizes.numel() for chunk in stored.chunks)
    if dtype not in _CODES or len(places) != len(stored.chunks) or held != stored.size.numel():
        raise CheckpointError(
            f"{name} is not whole, or of an unknown type: {dtype} {list(shape)}", str(directory)
        )
    first = places[0][1]
    nbytes = stored.size.numel() * dtype.itemsize
    return TensorEntry(name, _CODES[dtype], shape, directory / first.relative_path, nbytes, first.offset)


def _chunk_sizes(metadata: Metadata, key: str) -> dict[tuple[int, ...], tuple[int, ...]]:
    stored = metadata.state_dict_metadata[key]
    assert isinstance(stored, TensorStorageMetadata)
    return {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in stored.chunks}


def _check_files(files: tuple[Path, ...], directory: Path, metadata: Metadata) -> None:
    if missing := [path.name for path in files if not path.is_file()]:
        raise CheckpointError(
            f"{len(missing)} of {len(files)} files are missing: {', '.join(missing[:5])}",
            where=str(directory),
            fix="copy or download the missing files",
        )
    for path in files:
        ends = (i.offset + i.length for i in metadata.storage_data.values() if i.relative_path == path.name)
        if path.stat().st_size < max(ends):
            raise CheckpointError(
                f"the file is truncated: {path.stat().st_size:,} bytes", where=str(path), fix="copy it again"
            )


def _damaged(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{name} cannot be read: it is not the tensor that the metadata describes",
        where=str(path),
        fix="copy or download the file again",
    )
