"""Weights on disk: every version whole, or without what every server has from its first checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from miles.arch import load_spec
from miles.data.tasks import resolve_builtin
from miles.errors import CheckpointError
from miles.models.decoder import Decoder
from miles.orchestration.disk_weights import DiskWeights
from miles.weights.hf import read_hf, write_hf
from miles.weights.native_map import to_published

NORM, EXPERT = "model.norm.weight", "model.layers.1.mlp.experts.3.up_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Shared:
    """A directory, the trainer's weights, and servers that read versions of them."""

    def __init__(self, tmp_path: Path, delta: bool) -> None:
        spec = load_spec(resolve_builtin("builtin:sort"))
        assert spec.tie_word_embeddings
        torch.manual_seed(0)
        base = tmp_path / "base"
        write_hf(base, spec, ((name, torch.randn_like(t)) for name, t in to_published(Decoder(spec))))
        self.weights = dict(read_hf(base))
        self.begun: Mapping[str, Tensor] = dict(self.weights)
        directory = tmp_path / "weights"
        directory.mkdir()
        self._disk = DiskWeights(
            lambda: list(self.weights.items()), spec, base, directory, base=base if delta else None
        )

    def change(self, *names: str) -> None:
        self.weights |= {name: self.weights[name] + 1 for name in names}

    def write(self, version: int) -> dict[str, Tensor]:
        return dict(read_hf(asyncio.run(self._disk.weights(version)).directory))

    def assert_served(self, held: Mapping[str, Tensor]) -> None:
        assert all(torch.equal(held[name], tensor) for name, tensor in self.weights.items())
        assert torch.equal(held[HEAD], self.weights[EMBEDDING])


def test_a_version_is_whole_without_delta(tmp_path: Path) -> None:
    shared = Shared(tmp_path, delta=False)
    assert shared.write(1).keys() == {*shared.weights, HEAD}


def test_what_never_differed_from_the_first_checkpoint_is_not_written(tmp_path: Path) -> None:
    """A server that reads every version and one that was just started hold the same."""
    shared = Shared(tmp_path, delta=True)
    reads_all = dict(shared.begun)
    written = []
    for version, names in enumerate([(), (EXPERT,), (NORM, EMBEDDING), ()]):
        shared.change(*names)
        tensors = shared.write(version)
        written.append(set(tensors))
        reads_all |= tensors
        shared.assert_served(reads_all)
        shared.assert_served({**shared.begun, **tensors})
    # The checkpoint has no head of its own, so servers are given one.
    assert written == [{HEAD}, {HEAD, EXPERT}, *[{HEAD, EXPERT, NORM, EMBEDDING}] * 2]


def test_a_tensor_that_turns_back_is_written_again(tmp_path: Path) -> None:
    """A server that read it when it differed would keep it otherwise."""
    shared = Shared(tmp_path, delta=True)
    shared.change(NORM)
    shared.write(1)
    shared.weights[NORM] = shared.begun[NORM]
    assert torch.equal(shared.write(2)[NORM], shared.begun[NORM])


def test_weights_that_are_not_all_there_are_not_written(tmp_path: Path) -> None:
    shared = Shared(tmp_path, delta=True)
    del shared.weights[EXPERT]
    with pytest.raises(CheckpointError, match="missing"):
        shared.write(1)
    assert list((tmp_path / "weights").glob("weights-*")) == []
