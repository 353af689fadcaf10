"""Weights that travel as a checkpoint in a directory which trainer and servers share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from miles.arch import ArchSpec
from miles.orchestration.sglang_servers import DiskPacket
from miles.rollout.sglang.weight_payload import with_tied_head
from miles.weights.hf import write_hf

KEPT = 2
"""Versions on disk: the current one, and the one before it, which a server may still be reading."""


class DiskWeights:
    """A source of `DiskPacket`s; each version appears whole or not at all."""

    def __init__(
        self,
        named_weights: Callable[[], Iterable[tuple[str, Tensor]]],
        spec: ArchSpec,
        source_dir: Path,
        directory: Path,
    ) -> None:
        """`source_dir`: a checkpoint whose config goes along. `directory`: where versions are written."""
        self._named_weights, self._spec = named_weights, spec
        self._source_dir, self._directory = source_dir, directory

    async def weights(self, version: int) -> DiskPacket:
        """Write the weights of this moment. Raises CheckpointError when they cannot be written."""
        target = self._directory / f"weights-{version:06d}"
        # Left by an attempt that was cut short: this one's weights replace it.
        shutil.rmtree(target, ignore_errors=True)
        named = self._named_weights()
        write_hf(
            target,
            self._spec,
            with_tied_head(named) if self._spec.tie_word_embeddings else named,
            source_dir=self._source_dir,
        )
        for old in sorted(self._directory.glob("weights-*"))[:-KEPT]:
            shutil.rmtree(old)
        return DiskPacket(target, version)
