"""Trainer and servers on the same GPUs: in which order memory is given, taken and filled."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from miles.errors import RunError
from miles.http_client import HttpClient
from miles.orchestration.handle_weights import HandleWeights
from miles.orchestration.ray_shared_gpus import Placed, in_rank_order, server_parts
from miles.orchestration.turns import Held, NoTurns, SharedGpus
from miles.planning.facts.checkpoint import read_checkpoint
from miles.rollout.sglang.control import UpdateFailed
from miles.rollout.sglang.engine import SglangEngine, SglangSettings
from miles.rollout.sglang.ipc_payload import DEVICE, by_uuid, encode_handles
from tests.cpu.rollout.fake_sglang import FakeSglang

BUCKETS = [[("model.embed_tokens.weight", torch.ones(4, 2))], [("model.norm.weight", torch.zeros(2))]]
UPDATE = "/update_weights_from_tensor"


class FakeTrainer:
    """One rank that writes into the log of the server what it is told to hold."""

    def __init__(self, log: list[tuple[str, Any]]) -> None:
        self._log, self._left = log, list(BUCKETS)

    async def hold(self, held: Held) -> None:
        self._log.append(("hold", held))

    async def next_handles(self, version: int) -> tuple[list[str], bool]:
        bucket = self._left.pop(0)
        return [encode_handles(bucket)], not self._left

    async def drop_handles(self) -> None:
        self._log.append(("drop", None))


def one_step(sessions: bool = False, moves_trainer: bool = True, ranks: int = 1) -> FakeSglang:
    """The calls of a step, once its rollout has ended."""

    async def scenario() -> FakeSglang:
        spec = read_checkpoint("builtin:sort")[0].spec
        assert spec is not None
        async with FakeSglang(sessions=sessions).running() as server:
            engine = SglangEngine(HttpClient(server.url), spec, SglangSettings(max_context_len=16))
            trainer = FakeTrainer(server.calls)
            turns = SharedGpus(trainer, [engine], moves_trainer, moves_engines=True)
            await turns.to_training()
            assert not engine.health().ok, "a server without weights does not serve"
            server.calls.append(("train", None))
            await turns.to_update()
            await HandleWeights(trainer, [engine], gpus=ranks).send(version=3)
            await turns.to_rollout()
            assert engine.health().ok and engine.health().weight_version == 3
            return server

    return asyncio.run(asyncio.wait_for(scenario(), 300))


def told(server: FakeSglang) -> list[tuple[str, Any]]:
    """Path and what matters of it."""
    return [(path, body.get("tags") if isinstance(body, dict) else body) for path, body in server.calls]


def test_a_step_gives_and_takes_memory_in_this_order() -> None:
    server = one_step()
    assert told(server) == [
        ("/release_memory_occupation", ["kv_cache", "cuda_graph", "weights"]),
        ("hold", "everything"),
        ("train", None),
        ("hold", "weights"),
        ("/resume_memory_occupation", ["weights"]),
        ("/begin_weight_update", None),
        (UPDATE, None),
        ("drop", None),
        (UPDATE, None),
        ("drop", None),
        ("/model_info", None),
        ("hold", "nothing"),
        ("/resume_memory_occupation", ["kv_cache", "cuda_graph"]),
    ]


def test_weights_arrive_whole_in_buckets_and_the_version_with_the_last() -> None:
    server = one_step(sessions=True)
    assert server.received.keys() == {name for bucket in BUCKETS for name, _ in bucket}
    versions = [body.get("weight_version") for path, body in server.calls if path == UPDATE]
    assert versions == [None, "3"]
    assert not server.in_session, "the session of a newer server is closed"
    assert not any(body["flush_cache"] for path, body in server.calls if path == UPDATE), "it has no cache"


def test_a_trainer_that_is_told_to_stay_is_not_moved() -> None:
    assert not [body for path, body in one_step(moves_trainer=False).calls if path == "hold"]


def test_servers_whose_gpus_are_not_the_trainers_are_refused() -> None:
    with pytest.raises(RunError, match="one for one"):
        one_step(ranks=2)


def test_an_update_that_breaks_off_leaves_a_server_that_does_not_serve() -> None:
    async def scenario() -> None:
        spec = read_checkpoint("builtin:sort")[0].spec
        assert spec is not None
        async with FakeSglang().running() as server:
            engine = SglangEngine(HttpClient(server.url), spec, SglangSettings(max_context_len=16))
            server.overrides[UPDATE] = (400, {"success": False, "message": "no"})
            with pytest.raises(UpdateFailed):
                await HandleWeights(FakeTrainer(server.calls), [engine], gpus=1).send(version=1)
            assert not engine.health().ok

    asyncio.run(asyncio.wait_for(scenario(), 300))


def test_a_checkpoint_is_saved_with_the_trainer_whole_and_the_engines_weights_kept() -> None:
    log: list[tuple[str, Any]] = []

    class Engine:
        async def release(self, tags: Any) -> None:
            log.append(("release", tuple(tags)))

        async def reclaim(self, tags: Any) -> None:
            log.append(("reclaim", tuple(tags)))

    async def save() -> None:
        log.append(("save", None))

    asyncio.run(SharedGpus(FakeTrainer(log), [Engine()], True, True).saving(save))
    cache = ("kv_cache", "cuda_graph")
    assert log == [
        ("release", cache),
        ("hold", "everything"),
        ("save", None),
        ("hold", "nothing"),
        ("reclaim", cache),
    ]
    log.clear()
    asyncio.run(NoTurns().saving(save))
    assert log == [("save", None)]


def test_a_handle_names_its_gpu_by_uuid() -> None:
    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    arguments = tuple(names)
    changed = by_uuid(arguments, lambda device: f"uuid of {device}")
    assert DEVICE == 6, "where SGLang's patch_torch looks for it"
    assert changed[DEVICE] == "uuid of storage_device"
    assert [c for i, c in enumerate(changed) if i != DEVICE] == [
        n for i, n in enumerate(names) if i != DEVICE
    ]


def placed(*where: tuple[str, str]) -> list[Placed]:
    return [Placed(None, node, gpu, bundle) for bundle, (node, gpu) in enumerate(where)]  # type: ignore[arg-type]


def test_ranks_follow_nodes_and_their_gpus_as_servers_number_them() -> None:
    ranks = in_rank_order(placed(("b", "1"), ("a", "10"), ("b", "0"), ("a", "2")))
    assert [(rank.node, rank.gpu) for rank in ranks] == [("a", "2"), ("a", "10"), ("b", "0"), ("b", "1")]


def test_a_server_over_two_nodes_meets_on_the_first() -> None:
    head, second = server_parts(placed(("a", "0"), ("a", "1"), ("b", "0"), ("b", "1")), port=5000)
    assert (head.gpus, head.args) == (
        ("0", "1"),
        {"nnodes": 2, "dist_init_addr": "a:5000", "node_rank": 0},
    )
    assert second.bundle == 2 and second.args["node_rank"] == 1
    (alone,) = server_parts(placed(("a", "0"), ("a", "1")), port=5000)
    assert alone.args == {}
