"""Weights between processes: every format arrives bit for bit, and what is damaged is never loaded."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from miles.errors import RunError
from miles.orchestration.weight_packets import WeightsDamaged, pack, unpack, verify
from miles.orchestration.weight_sync import MAX_SENDS, PacketWeights
from miles.record import RecordWriter, RunReader

FORMATS = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8)


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_tensor_arrives_bit_for_bit(dtype: torch.dtype) -> None:
    sent = torch.arange(24, dtype=torch.float32).reshape(4, 6).to(dtype)
    manifest, weights = pack([("w", sent.t())], version=3)
    for _, array in weights.values():
        array.setflags(write=False)  # as the object store gives it
    verify(manifest, weights)
    ((name, received),) = unpack(weights)
    assert name == "w" and received.dtype == dtype and manifest.version == 3
    assert torch.equal(received.view(torch.uint8), sent.t().contiguous().view(torch.uint8))


def test_one_altered_bit_is_named() -> None:
    manifest, weights = pack([("a", torch.ones(8)), ("b", torch.ones(8))], version=1)
    altered = weights["b"][1].copy()
    altered.view(np.uint8)[5] ^= 1
    with pytest.raises(WeightsDamaged, match="checksum of b"):
        verify(manifest, weights | {"b": ("float32", altered)})


@pytest.mark.parametrize("place", [0, 40_001, 65_535, 65_536, 70_002])
def test_any_bit_of_a_large_tensor_counts(place: int) -> None:
    """Four whole blocks of the checksum, and what is left behind them."""
    manifest, weights = pack([("w", torch.randn(17_501))], version=1)
    altered = weights["w"][1].copy()
    altered.view(np.uint8)[place] ^= 64
    with pytest.raises(WeightsDamaged, match="checksum of w"):
        verify(manifest, {"w": ("float32", altered)})


def test_blocks_in_another_order_are_damage() -> None:
    manifest, weights = pack([("w", torch.randn(8192))], version=1)
    swapped = np.concatenate([weights["w"][1][4096:], weights["w"][1][:4096]])
    with pytest.raises(WeightsDamaged, match="checksum of w"):
        verify(manifest, {"w": ("float32", swapped)})


def test_a_missing_tensor_is_named() -> None:
    manifest, weights = pack([("a", torch.ones(8)), ("b", torch.ones(8))], version=1)
    del weights["a"]
    with pytest.raises(WeightsDamaged, match="without a"):
        verify(manifest, weights)


class Source:
    async def weights(self, version: int) -> Any:
        return f"packet {version}"


class Pool:
    """Refuses the first so many packets."""

    def __init__(self, damaged: int) -> None:
        self.damaged, self.received = damaged, 0

    async def receive(self, packet: Any) -> None:
        self.received += 1
        if self.received <= self.damaged:
            raise WeightsDamaged("checksum of a")


def test_a_damaged_transfer_is_repeated_and_recorded(tmp_path: Any) -> None:
    pool = Pool(damaged=MAX_SENDS - 1)
    with RecordWriter(tmp_path) as record:
        asyncio.run(PacketWeights(Source(), pool, record).send(version=4))  # type: ignore[arg-type]
    assert pool.received == MAX_SENDS
    failed = RunReader(tmp_path).events("weight_sync_failed")
    assert [event["sends"] for event in failed] == [1, 2] and failed[0]["version"] == 4


def test_a_transfer_that_never_succeeds_ends_the_run(tmp_path: Any) -> None:
    with RecordWriter(tmp_path) as record:
        sync = PacketWeights(Source(), Pool(damaged=99), record)  # type: ignore[arg-type]
        with pytest.raises(RunError, match=f"version 4 .* {MAX_SENDS} attempts"):
            asyncio.run(sync.send(version=4))
