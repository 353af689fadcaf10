"""Which weights go into which file, and where: the layout of the target, known before anything is written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod

import torch

from miles.arch.safetensors_header import SINGLE_FILE
from miles.weights.convert.moves import Move
from miles.weights.convert.run_state import MODEL_DIR, OPTIMIZER_DIR, PREFIX, split_key
from miles.weights.convert.wanted import Wanted
from miles.weights.safetensors_io import DTYPES, file_layout

MAX_DCP_BYTES = 1 << 29
"""Files of a distributed checkpoint are written from front to back, by one worker each."""

Group = tuple[Move, ...]
"""Weights that are transformed together; nearly always one."""

_FUSED = re.compile(r"\.(?:(gate_proj|up_proj|w1|w3)|[qkv]_proj)\.weight$")


@dataclass(frozen=True)
class Shard:
    """A file of the target."""

    file: str
    groups: tuple[Group, ...]
    size: int
    header: bytes = b""
    begins: Mapping[str, int] = field(default_factory=dict)
    """Where each tensor begins in the file, by published name; empty where that shows while it is written."""

    @property
    def names(self) -> Iterator[str]:
        return (name for group in self.groups for one in group for name in one.forms)


def pack(moves: Iterable[Move], wanted: Wanted) -> tuple[Shard, ...]:
    """Fill files in the order of the source; a group that is larger than a file gets one of its own."""
    if wanted.layout == "native":
        return _step_shards(list(moves), wanted)
    is_dcp = wanted.layout == "dcp"
    limit = min(wanted.max_shard_bytes, MAX_DCP_BYTES) if is_dcp else wanted.max_shard_bytes
    bins: list[list[Group]] = [[]]
    filled = 0
    for group in grouped(moves):
        size = sum(form_bytes(one) for one in group)
        if bins[-1] and filled + size > limit:
            bins.append([])
            filled = 0
        bins[-1].append(group)
        filled += size
    make = _dcp_shard if is_dcp else _shard
    return tuple(make(index, len(bins), tuple(groups)) for index, groups in enumerate(bins))


def _step_shards(moves: list[Move], wanted: Wanted) -> tuple[Shard, ...]:
    """The model's files, and one for each moment."""
    weights = [one for one in moves if not one.name.startswith(PREFIX)]
    shards = pack(weights, replace(wanted, layout="hf"))
    found = [replace(shard, file=f"{MODEL_DIR}/{shard.file}") for shard in shards]
    moments: dict[str, list[Group]] = {}
    for one in moves:
        if one.name.startswith(PREFIX):
            moments.setdefault(split_key(one.name)[0], []).append((one,))
    for moment, groups in moments.items():
        whole = _shard(0, 1, tuple(groups))
        found.append(replace(whole, file=f"{OPTIMIZER_DIR}/{moment}.safetensors"))
    return tuple(found)


def grouped(moves: Iterable[Move]) -> Iterator[Group]:
    """Single weights, but NVFP4 matrices that a kernel multiplies as one (gate and up; q, k and v): they
    share an outer scale. Groups come in the order of their first weights.
    """
    groups: dict[str, list[Move]] = {}
    for one in moves:
        fused = one.target is not None and one.target.name == "nvfp4" and one.how != "copied"
        groups.setdefault(_FUSED.sub(_fused_name, one.name) if fused else one.name, []).append(one)
    return (tuple(group) for group in groups.values())


def form_bytes(one: Move) -> int:
    return sum(DTYPES[code].itemsize * prod(shape) for code, shape in one.forms.values())


def _fused_name(found: re.Match[str]) -> str:
    return ".gate and up" if found[1] else ".q, k and v"


def _shard(index: int, count: int, groups: tuple[Group, ...]) -> Shard:
    file = SINGLE_FILE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
    forms = {
        name: (torch.Size(shape), DTYPES[code])
        for group in groups
        for one in group
        for name, (code, shape) in one.forms.items()
    }
    header, begins, end = file_layout(forms)
    return Shard(file, groups, len(header) + end, header, {n: len(header) + b for n, b in begins.items()})


def _dcp_shard(index: int, count: int, groups: tuple[Group, ...]) -> Shard:
    size = sum(form_bytes(one) for group in groups for one in group)
    return Shard(f"__{index}_0.distcp", groups, size)
