"""Weights of an SGLang server: whole, or only what it was not given last."""

from __future__ import annotations

import asyncio

import pytest
import torch

from miles.http_client import HttpClient
from miles.orchestration.sglang_servers import ServedEngine, TensorPacket
from miles.orchestration.weight_packets import pack
from miles.orchestration.worker_loss import WorkerLost
from miles.planning.facts.checkpoint import read_checkpoint
from miles.rollout.sglang.engine import SglangEngine, SglangSettings
from tests.cpu.rollout.fake_sglang import FakeSglang

UPDATE = "/update_weights_from_tensor"


def packet(version: int, norm: float = 0.0) -> TensorPacket:
    weights = [("model.embed_tokens.weight", torch.ones(4, 2)), ("model.norm.weight", torch.full((2,), norm))]
    return TensorPacket(*pack(weights, version))


@pytest.mark.parametrize("delta", [False, True])
def test_under_delta_only_what_differs_travels_again(delta: bool) -> None:
    async def scenario() -> None:
        spec = read_checkpoint("builtin:sort")[0].spec
        assert spec is not None
        async with FakeSglang().running() as server:
            engine = SglangEngine(HttpClient(server.url), spec, SglangSettings(max_context_len=16))
            served = ServedEngine("engine-0", engine, None, delta=delta)
            whole = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]

            await served.load(packet(1))
            await served.load(packet(2, norm=5.0))
            await served.load(packet(3, norm=5.0))
            changed = [["model.norm.weight"], []] if delta else [whole, whole]
            assert server.buckets == [whole, *changed] and server.version == "3"
            assert (await served.metrics())["weight_bytes_sent"] == (0 if delta else 72)

            server.overrides[UPDATE] = 400, {"success": False, "message": "no"}
            with pytest.raises(WorkerLost):
                await served.load(packet(4, norm=6.0))
            del server.overrides[UPDATE]
            await served.load(packet(5, norm=6.0))
            assert server.buckets[-1] == whole, "after a failure nothing is known of what it holds"

    asyncio.run(scenario())
