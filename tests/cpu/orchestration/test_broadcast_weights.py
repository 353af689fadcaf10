"""Weights through one process group of trainer and servers: real gloo, servers that speak the contract."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import torch

from miles.errors import RunError
from miles.http_client import HttpClient
from miles.orchestration import broadcast_weights, weight_group
from miles.orchestration.broadcast_weights import MAX_SENDS, BroadcastWeights
from miles.orchestration.engine_pool import EnginePool
from miles.orchestration.local_weights import OwnBroadcast
from miles.orchestration.seats import Seat
from miles.orchestration.sglang_servers import ServedEngine
from miles.orchestration.train_worker import TrainWorker
from miles.orchestration.weight_sender import WeightSender
from miles.orchestration.worker_loss import WorkerLost
from miles.planning.facts.checkpoint import read_checkpoint
from miles.rollout.engine import GenerateRequest, SamplingParams
from miles.rollout.sglang.engine import SglangEngine, SglangSettings
from tests.cpu.rollout.fake_sglang import FakeSglang

DISTRIBUTED = "/update_weights_from_distributed"
JOIN = "/init_weights_update_group"
NAMES = [f"model.layers.{i}.weight" for i in range(6)]


class Noted:
    """A record that keeps its events."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append({"kind": kind, **fields})


class Stage:
    """A trainer with six tensors, servers in their seats, and the broadcast between them."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack, self.record = stack, Noted()
        self.weights = {name: torch.full((4,), float(i)) for i, name in enumerate(NAMES)}
        self.servers: dict[str, list[FakeSglang]] = {}
        self.gathered = 0

    async def begin(self, servers: int, delta: bool = False, sessions: bool = False) -> None:
        def named() -> Any:
            for name, tensor in self.weights.items():
                self.gathered += 1
                yield name, tensor

        self._sessions = sessions
        self.trainer = TrainWorker(None, None)  # type: ignore[arg-type]
        self.source = OwnBroadcast(self.trainer, WeightSender(named, 40, "cpu", delta))
        self.pool = EnginePool([self._seat(f"engine-{i}") for i in range(servers)])
        self.sync: BroadcastWeights | None = None
        await asyncio.gather(*(seat.fill() for seat in self.pool.seats))
        self.sync = BroadcastWeights(self.source, self.pool, 1, self.record)  # type: ignore[arg-type]

    def _seat(self, name: str) -> Seat[Any]:
        async def launch() -> ServedEngine:
            server = await self._stack.enter_async_context(FakeSglang(sessions=self._sessions).running())
            self.servers.setdefault(name, []).append(server)
            spec = read_checkpoint("builtin:sort")[0].spec
            assert spec is not None
            engine = SglangEngine(HttpClient(server.url), spec, SglangSettings(max_context_len=16))
            served = ServedEngine(name, engine, None)
            served._probed = True
            if self.sync is not None:
                await self.sync.catch_up(served)
            return served

        return Seat(name, launch, 3, lambda kind, **fields: self.record.event(kind, **fields))

    def learn(self, by: float = 10.0) -> None:
        self.weights = {name: tensor + by for name, tensor in self.weights.items()}
        self.trainer.learnt += 1

    def serving(self) -> list[FakeSglang]:
        return [started[-1] for started in self.servers.values()]

    def assert_held(self, version: int) -> None:
        for server in self.serving():
            assert server.version == str(version)
            assert {name: t.tolist() for name, t in server.received.items()} == {
                name: t.tolist() for name, t in self.weights.items()
            }
            assert not server.paused and not server.in_session and len(server.groups) <= 1

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in self.record.events if event["kind"] in kinds]


@asynccontextmanager
async def staged(servers: int, **more: bool) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        stage = Stage(stack)
        await stage.begin(servers, **more)
        yield stage


def request(group: int) -> GenerateRequest:
    sampling = SamplingParams(max_new_tokens=2, temperature=1.0)
    return GenerateRequest(input_ids=[1, 2], sampling=sampling, sample_key=group, group=group)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scenario(), 300)

    asyncio.run(bounded())


@pytest.mark.parametrize("sessions", [False, True])
def test_all_servers_are_in_one_group_that_lasts(sessions: bool) -> None:
    async def scenario() -> None:
        async with staged(3, sessions=sessions) as stage:
            assert stage.sync is not None
            for version in (1, 2):
                await stage.sync.send(version)
                stage.assert_held(version)
                stage.learn()
            joins = [body for s in stage.serving() for path, body in s.calls if path == JOIN]
            assert [(body["rank_offset"], body["world_size"]) for body in joins] == [(1, 4), (2, 4), (3, 4)]
            # 40 bytes a bucket: two tensors of 16.
            assert stage.serving()[0].buckets == [NAMES[0:2], NAMES[2:4], NAMES[4:6]] * 2
            sent = stage.events("weights_broadcast")
            assert [(e["version"], e["bytes"], e["buckets"]) for e in sent] == [(1, 96, 3), (2, 96, 3)]
            assert (await stage.pool.measurements())[0]["weight_bytes_sent"] == 96

    run(scenario)


def test_the_next_bucket_is_gathered_while_one_is_on_its_way() -> None:
    async def scenario() -> None:
        async with staged(1) as stage:
            assert stage.sync is not None
            (server,), gathered = stage.serving(), []
            # A bucket ends when the first tensor of the next one is seen.
            behind = [5, 6, 6]
            answer = server._on_update_weights_from_distributed

            async def slow(body: Any) -> Any:
                while stage.gathered < behind[len(gathered)]:
                    await asyncio.sleep(0.01)
                gathered.append(stage.gathered)
                return await answer(body)

            server._on_update_weights_from_distributed = slow  # type: ignore[method-assign]
            await stage.sync.send(1)
            assert gathered == behind, "before a bucket is taken the one behind it is there"
            (sent,) = stage.events("weights_broadcast")
            assert 0 < sent["gather_seconds"] < sent["seconds"] and 0 < sent["send_seconds"] < sent["seconds"]

    run(scenario)


def test_under_delta_the_group_is_sent_what_differs() -> None:
    async def scenario() -> None:
        async with staged(2, delta=True) as stage:
            assert stage.sync is not None
            await stage.sync.send(1)
            stage.weights[NAMES[3]] += 1
            await stage.sync.send(2)
            await stage.sync.send(3)
            stage.assert_held(3)
            assert [e["bytes"] for e in stage.events("weights_broadcast")] == [96, 16, 0]
            await stage.pool.seats[0].replace(stage.pool.seats[0].worker, WorkerLost("engine-0", "killed"))
            stage.learn()
            await stage.sync.send(4)
            stage.assert_held(4)
            sent = stage.events("weights_broadcast")[3:]
            assert [e["bytes"] for e in sent] == [96, 96], "of what a new group holds nothing is known"

    run(scenario)


@pytest.mark.parametrize("bucket", [0, 1], ids=["first bucket", "in the middle"])
def test_a_server_that_dies_in_a_broadcast_is_replaced_and_takes_no_other_with_it(
    bucket: int,
) -> None:
    async def scenario() -> None:
        async with staged(4) as stage:
            assert stage.sync is not None
            await stage.sync.send(1)
            stage.learn()
            for server in stage.serving():
                server.buckets.clear()
            stage.servers["engine-1"][0].dies_on_bucket = bucket
            await stage.sync.send(2)
            stage.assert_held(2)
            assert {name: len(started) for name, started in stage.servers.items()} == {
                "engine-0": 1, "engine-1": 2, "engine-2": 1, "engine-3": 1,
            }  # fmt: skip
            (failed,) = stage.events("weight_sync_failed")
            assert failed["version"] == 2 and failed["lost"] == ["engine-1"] and failed["reason"]
            assert [e["worker"] for e in stage.events("worker_dead", "restart")] == ["engine-1"] * 2

    run(scenario)


def test_a_server_that_does_not_answer_in_a_broken_broadcast_is_lost_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(broadcast_weights, "GRACE_S", 0.2)

    async def scenario() -> None:
        async with staged(2) as stage:
            assert stage.sync is not None
            await stage.sync.send(1)
            hung, dead = stage.serving()

            async def never(body: Any) -> Any:
                await asyncio.sleep(3600)

            hung._on_update_weights_from_distributed = never  # type: ignore[method-assign]
            hung.buckets.clear()
            dead.buckets.clear()
            dead.dies_on_bucket = 0
            await stage.sync.send(2)
            stage.assert_held(2)
            assert stage.events("weight_sync_failed")[0]["lost"] == ["engine-0", "engine-1"]

    run(scenario)


@pytest.mark.parametrize("hangs", [False, True], ids=["dies", "hangs"])
def test_a_server_that_is_lost_while_all_meet_takes_no_other_with_it(
    hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_group, "LINGER_S", 0.0)
    monkeypatch.setattr(broadcast_weights, "GRACE_S", 0.5 if hangs else 30.0)
    usual = weight_group.MEET_S
    if hangs:
        monkeypatch.setattr(weight_group, "MEET_S", 0.5)

    async def scenario() -> None:
        async with staged(4) as stage:
            assert stage.sync is not None
            servers = stage.serving()
            lost = servers[1]

            async def fails(body: Any) -> Any:
                # The others wait for it in the trainer's store.
                while not all(server.met for server in servers if server is not lost):
                    await asyncio.sleep(0)
                if hangs:
                    monkeypatch.setattr(weight_group, "MEET_S", usual)
                    await asyncio.sleep(3600)
                lost.die()

            lost._on_init_weights_update_group = fails  # type: ignore[method-assign]
            await stage.sync.send(1)
            stage.assert_held(1)
            assert {name: len(started) for name, started in stage.servers.items()} == {
                "engine-0": 1, "engine-1": 2, "engine-2": 1, "engine-3": 1,
            }  # fmt: skip
            (failed,) = stage.events("weight_sync_failed")
            assert failed["version"] == 1 and failed["lost"] == ["engine-1"]
            assert ("had come" in failed["reason"]) == hangs

    run(scenario)


def test_a_server_that_is_gone_already_is_missed_before_the_others_meet() -> None:
    async def scenario() -> None:
        async with staged(3) as stage:
            assert stage.sync is not None
            survivors = stage.serving()[1:]
            stage.serving()[0].die()
            await stage.sync.send(1)
            stage.assert_held(1)
            assert stage.serving()[1:] == survivors
            assert [server.paths.count(JOIN) for server in survivors] == [1, 1], "the meeting of all three"

    run(scenario)


def test_servers_on_their_way_to_a_meeting_that_broke_off_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch would look for the trainer's store for as long as for one that is not there yet."""
    monkeypatch.setattr(weight_group, "LINGER_S", 0.7)

    async def scenario() -> None:
        async with staged(2) as stage:
            assert stage.sync is not None
            lost, late = stage.serving()
            broke, drop = asyncio.Event(), stage.source.drop_group
            join = late._on_init_weights_update_group

            async def noted() -> None:
                if JOIN in late.paths:
                    broke.set()
                await drop()

            async def dies(body: Any) -> Any:
                lost.die()

            async def comes_late(body: Any) -> Any:
                await broke.wait()
                return await join(body)

            stage.source.drop_group = noted  # type: ignore[method-assign]
            lost._on_init_weights_update_group = dies  # type: ignore[method-assign]
            late._on_init_weights_update_group = comes_late  # type: ignore[method-assign]
            await stage.sync.send(1)
            stage.assert_held(1)
            assert {name: len(started) for name, started in stage.servers.items()} == {
                "engine-0": 2,
                "engine-1": 1,
            }

    run(scenario)


def test_weights_that_every_server_refuses_end_the_run() -> None:
    """No server is replaced for it: it is there, and another one would refuse them as well."""

    async def scenario() -> None:
        async with staged(2) as stage:
            assert stage.sync is not None
            for server in stage.serving():
                server.overrides[DISTRIBUTED] = 400, {"success": False, "message": "shape mismatch"}
            with pytest.raises(RunError, match="could not be handed over") as raised:
                await stage.sync.send(1)
            assert "shape mismatch" in raised.value.why
            assert len(stage.events("weight_sync_failed")) == MAX_SENDS
            assert not stage.events("worker_dead")

    run(scenario)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_server_that_is_replaced_has_the_trainer_s_weights_before_it_serves(steps: int) -> None:
    """Those of the others are gone once the trainer has learnt: they go by the step that made them."""

    async def scenario() -> None:
        async with staged(2) as stage:
            assert stage.sync is not None
            await stage.sync.send(1)
            for _ in range(steps):
                stage.learn()
            seat = stage.pool.seats[1]
            await seat.replace(seat.worker, WorkerLost("engine-1", "killed"))
            other, server = stage.serving()
            assert other.version == "1" and server.version == str(1 + steps) and not server.paused
            assert {n: t.tolist() for n, t in server.received.items()} == {
                n: t.tolist() for n, t in stage.weights.items()
            }
            sent = stage.events("weights_broadcast")[1:]
            assert [(e["version"], e["engines"]) for e in sent] == [(1 + steps, ["engine-1"])]
            await stage.sync.send(2 + steps)
            stage.assert_held(2 + steps)

    run(scenario)


@pytest.mark.parametrize("lost", ["one", "all"])
def test_requests_go_on_over_servers_that_are_lost_in_a_broadcast(lost: str) -> None:
    async def scenario() -> None:
        async with staged(2) as stage:
            assert stage.sync is not None
            await stage.sync.send(1)
            stage.learn()
            first = stage.serving()
            for server in first:
                server.buckets.clear()
                server.finish.clear()
                server.cut_after = 1
            for server in first if lost == "all" else first[:1]:
                server.dies_on_bucket = 1
            asked = [asyncio.create_task(stage.pool.generate([request(n)])) for n in range(2)]
            await asyncio.gather(*(server.generating.wait() for server in first))
            await stage.sync.send(2)
            stage.assert_held(2)
            outputs = [output for answer in await asyncio.gather(*asked) for output in answer]
            begun_anew, gone_on_with = [(2, 0)], [(1, 0), (2, 1)]
            spans = [begun_anew, begun_anew if lost == "all" else gone_on_with]
            assert [output.weight_versions for output in outputs] == spans
            dead = 2 if lost == "all" else 1
            assert len(stage.events("worker_dead")) == len(stage.events("restart")) == dead

    run(scenario)


def test_the_trainer_waits_with_a_step_until_a_replaced_server_has_its_weights() -> None:
    """Between two buckets the weights must not change."""

    async def scenario() -> None:
        async with staged(1) as stage:
            assert stage.sync is not None
            await stage.sync.send(1)
            seat, order = stage.pool.seats[0], []

            async def step() -> None:
                async with stage.trainer.still:
                    order.append(stage.serving()[0].version)

            replacing = asyncio.create_task(seat.replace(seat.worker, WorkerLost("engine-0", "killed")))
            while not stage.trainer.still.locked():
                await asyncio.sleep(0)
            await asyncio.gather(step(), replacing)
            assert order == ["1"]

    run(scenario)


def test_an_update_and_the_replacement_of_a_server_do_not_wait_for_each_other() -> None:
    """The replacement, begun first, wants the trainer; the update has it, and finds the dead one."""

    async def scenario() -> None:
        async with staged(2) as stage:
            assert stage.sync is not None
            await stage.sync.send(1)
            stage.learn()
            stage.servers["engine-0"][0].die()
            seat = stage.pool.seats[0]
            replacing = seat.replace(seat.worker, WorkerLost("engine-0", "killed"))
            await asyncio.gather(stage.sync.send(2), replacing)
            stage.assert_held(2)
            assert len(stage.servers["engine-0"]) == 2

    run(scenario)
