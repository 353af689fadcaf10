"""Which model a run trains and serves: the checkpoint's, with the MTP layers that the run asks for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from miles.arch import ArchSpec, load_spec, with_mtp
from miles.config import RunConfig
from miles.orchestration.checkpoint_sources import CheckpointSource
from miles.planning.speculation import mtp_layers
from miles.weights.hf import read_hf
from miles.weights.native_map import without_spare_mtp


def run_model(config: RunConfig, source: CheckpointSource) -> ArchSpec:
    """The model of the run. MTP layers that nobody asks for are left out."""
    saved = load_spec(source.directory)
    return with_mtp(saved, mtp_layers(config, saved.mtp_num_layers))


def read_weights(directory: Path, spec: ArchSpec) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint that `spec` wants; MTP layers beyond those stay behind."""
    return without_spare_mtp(load_spec(directory), spec, read_hf(directory))
