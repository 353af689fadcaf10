"""Weights that travel as a checkpoint in a directory which trainer and servers share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from miles.arch import ArchSpec, check_shapes
from miles.arch.safetensors_header import read_headers
from miles.orchestration.sglang_servers import DiskPacket
from miles.rollout.sglang.weight_payload import with_tied_head
from miles.weights.hf import TORCH_DTYPES, stored_dtype, write_hf

KEPT = 2
"""Versions on disk: the current one, and the one before it, which a server may still be reading."""

Named = Iterable[tuple[str, Tensor]]


class DiskWeights:
    """A source of `DiskPacket`s; each version appears whole or not at all."""

    def __init__(
        self,
        named_weights: Callable[[], Named],
        spec: ArchSpec,
        source_dir: Path,
        directory: Path,
        base: Path | None = None,
    ) -> None:
        """`source_dir`: a checkpoint whose config goes along. `directory`: where versions are written.

        `base`: the checkpoint that every server begins with; what has never differed from it is left out.
        """
        self._named_weights, self._spec = named_weights, spec
        self._source_dir, self._directory = source_dir, directory
        self._moved = None if base is None else Moved(base, spec)

    async def weights(self, version: int) -> DiskPacket:
        """Write the weights of this moment. Raises CheckpointError when they cannot be written."""
        target = self._directory / f"weights-{version:06d}"
        # Left by an attempt that was cut short: this one's weights replace it.
        shutil.rmtree(target, ignore_errors=True)
        named = self._named_weights()
        named = with_tied_head(named) if self._spec.tie_word_embeddings else named
        written = named if self._moved is None else self._moved.among(named)
        write_hf(target, self._spec, written, source_dir=self._source_dir, whole=self._moved is None)
        for old in sorted(self._directory.glob("weights-*"))[:-KEPT]:
            shutil.rmtree(old)
        return DiskPacket(target, version)


class Moved:
    """Which tensors have differed, once or now, from those of a checkpoint as it is stored.

    A server that began with it and then read any of the versions, or none, has the others already.
    """

    def __init__(self, base: Path, spec: ArchSpec) -> None:
        self._spec, self._dtype = spec, TORCH_DTYPES[spec.dtype]
        self._base = read_headers(base)
        self._names: set[str] = set()

    def among(self, named: Named) -> Iterator[tuple[str, Tensor]]:
        """Those of the tensors that a server may lack.

        Raises: CheckpointError when they are not all tensors of the model.
        """
        shapes = {}
        for name, tensor in named:
            shapes[name] = tuple(tensor.shape)
            if name not in self._names and self._differs(name, tensor):
                self._names.add(name)
            if name in self._names:
                yield name, tensor
        check_shapes(self._spec, shapes, where="the trainer's weights")

    def _differs(self, name: str, tensor: Tensor) -> bool:
        entry = self._base.get(name)
        if entry is None:
            return True
        with safe_open(entry.file, framework="pt") as file:
            begun = file.get_tensor(name)
        now = tensor.detach().to("cpu", stored_dtype(name, self._dtype))
        return begun.dtype != now.dtype or not torch.equal(begun, now)
