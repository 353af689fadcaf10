"""torch's distributed checkpoint (DCP), written a file at a time without a process group.

Layout: `torch.distributed.checkpoint.filesystem` (`__N_0.distcp`: tensors one after another, each as
`torch.save` leaves it; `.metadata`: where each of them is). Keys are published names, so that any program
that has the model loads its own shards with `torch.distributed.checkpoint.load`.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from miles.arch.safetensors_header import TensorEntry
from miles.weights.convert.errors import checked_cast
from miles.weights.convert.file_part import FilePart
from miles.weights.convert.moves import Move
from miles.weights.convert.shards import Shard
from miles.weights.convert.transfer import Outcome, Transfer, outcome
from miles.weights.safetensors_io import DTYPES

METADATA_FILE = ".metadata"
VERSION = "1.0.0"
"""Of the metadata, as torch writes it."""

Place = tuple[int, int]
"""Where a saved tensor begins in its file, and its length, in bytes."""


def write_dcp_file(
    path: Path, shard: Shard, transfer: Transfer
) -> tuple[dict[str, Outcome], dict[str, Place]]:
    """Write all weights of a shard and flush them to the disk; what became of them, and where they are."""
    outcomes: dict[str, Outcome] = {}
    places: dict[str, Place] = {}
    with path.open("w+b") as file:
        for one in (one for group in shard.groups for one in group):
            exact = transfer.numbers(one)
            ((code, _),) = one.forms.values()
            begin = file.seek(0, os.SEEK_END)
            torch.save(checked_cast(exact, DTYPES[code], one.name), file)
            places[one.name] = (begin, file.seek(0, os.SEEK_END) - begin)
            outcomes[one.name] = outcome(one)
            if transfer.verify:
                file.flush()
                outcomes[one.name] |= transfer.compared(exact, saved_entry(one, file, path, places[one.name]))
        file.flush()
        os.fsync(file.fileno())
    return outcomes, places


def saved_entry(one: Move, file: IO[bytes], path: Path, place: Place) -> TensorEntry:
    """Where the numbers of a tensor lie that `torch.save` wrote at a place, as an uncompressed zip file."""
    ((code, shape),) = one.forms.values()
    with zipfile.ZipFile(FilePart(file, *place)) as saved:
        (data,) = (info for info in saved.infolist() if Path(info.filename).parent.name == "data")
    local_header = place[0] + data.header_offset
    file.seek(local_header + 26)
    lengths = [int.from_bytes(file.read(2), "little") for _ in range(2)]
    return TensorEntry(one.name, code, shape, path, data.file_size, local_header + 30 + sum(lengths))


def write_dcp_metadata(
    directory: Path, shards: Iterable[Shard], places: Mapping[str, Mapping[str, Place]]
) -> None:
    """Write what `torch.distributed.checkpoint.load` reads first."""
    tensors: dict[str, Any] = {}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    for shard in shards:
        for one in (one for group in shard.groups for one in group):
            ((code, shape),) = one.forms.values()
            begin = torch.Size([0] * len(shape))
            chunk = ChunkStorageMetadata(offsets=begin, sizes=torch.Size(shape))
            properties = TensorProperties(dtype=DTYPES[code])
            tensors[one.name] = TensorStorageMetadata(properties, torch.Size(shape), [chunk])
            index = MetadataIndex(one.name, begin, 0)
            stored[index] = _StorageInfo(shard.file, *places[shard.file][one.name])
    paths = {name: (name,) for name in tensors}
    metadata = Metadata(tensors, planner_data=paths, storage_data=stored, version=VERSION)
    (directory / METADATA_FILE).write_bytes(pickle.dumps(metadata))
