"""Several trainer ranks answer the loop as one trainer, and the right error comes first."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from miles.errors import CheckpointError
from miles.orchestration import trainer_ranks
from miles.orchestration.sglang_servers import DiskPacket
from miles.orchestration.trainer_ranks import TrainerRanks, WrittenWeights
from miles.orchestration.worker_loss import WorkerLost
from miles.rollout.sglang.weight_payload import Announced


class Rank:
    """A rank that remembers what it was asked, and answers with its number or an error."""

    def __init__(self, number: int, node: str = "10.0.0.1", error: Exception | None = None) -> None:
        self.number, self._node, self.error = number, node, error
        self.delay = 0.0
        self.asked: list[tuple[Any, ...]] = []

    async def node(self) -> str:
        return self._node

    async def open_store(self, host: str) -> int:
        self.asked.append(("open_store", host))
        return 4242

    async def join(self, rank: int, size: int, meeting: tuple[str, int] | None) -> None:
        self.asked.append(("join", rank, size, meeting))

    def share(self, samples: list[str]) -> str:
        return f"shared {samples[0]}"

    async def train(self, shared: str) -> int:
        self.asked.append(("train", shared))
        await asyncio.sleep(self.delay)
        if self.error is not None:
            raise self.error
        return self.number

    async def next_bucket(self) -> Announced:
        self.asked.append(("next_bucket",))
        await asyncio.sleep(0.01)
        return Announced(("a",), ("float32",), ((1,),), 4, last=self.asked.count(("next_bucket",)) == 3)

    async def gather_along(self) -> None:
        self.asked.append(("gather_along",))
        await asyncio.sleep(self.delay)
        if self.error is not None:
            raise self.error

    async def drop_group(self) -> None:
        self.asked.append(("drop_group",))

    async def write_weights(self, version: int) -> DiskPacket:
        self.asked.append(("write_weights", version))
        return DiskPacket(Path("weights"), version)


def ask(*ranks: Rank) -> Any:
    return asyncio.run(TrainerRanks(ranks).train(["samples"]))


def test_every_rank_gets_the_same_samples_and_the_first_one_answers() -> None:
    ranks = [Rank(0), Rank(1), Rank(2)]
    assert ask(*ranks) == 0
    assert [rank.asked for rank in ranks] == [[("train", "shared samples")]] * 3


def test_ranks_of_one_machine_meet_on_loopback() -> None:
    ranks = [Rank(0), Rank(1)]
    asyncio.run(TrainerRanks(ranks).join())
    assert ranks[0].asked == [("open_store", "127.0.0.1"), ("join", 0, 2, ("127.0.0.1", 4242))]
    assert ranks[1].asked == [("join", 1, 2, ("127.0.0.1", 4242))]


def test_ranks_of_several_machines_meet_at_the_first() -> None:
    ranks = [Rank(0, "10.0.0.7"), Rank(1, "10.0.0.8")]
    asyncio.run(TrainerRanks(ranks).join())
    assert ranks[1].asked == [("join", 1, 2, ("10.0.0.7", 4242))]


def test_one_rank_has_nobody_to_meet() -> None:
    rank = Rank(0)
    asyncio.run(TrainerRanks([rank]).join())
    assert rank.asked == [("join", 0, 1, None)]


def test_a_lost_process_is_named_rather_than_the_connection_it_broke() -> None:
    broken = Rank(0, error=RuntimeError("connection closed by peer"))
    lost = Rank(1, error=WorkerLost("trainer-1", "killed"))
    lost.delay = 0.05
    with pytest.raises(WorkerLost, match="trainer-1"):
        ask(broken, lost)


def test_a_rank_that_waits_for_one_that_failed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_ranks, "GRACE_SECONDS", 0.05)
    waiting = Rank(1)
    waiting.delay = 600
    with pytest.raises(CheckpointError, match="disk"):
        ask(Rank(0, error=CheckpointError("disk full")), waiting)


def test_the_first_rank_cuts_buckets_and_the_others_gather_along() -> None:
    """They are called once for all buckets, and for the next version again."""
    ranks = [Rank(0), Rank(1), Rank(2)]
    ranks[2].delay = 0.02

    async def scenario() -> list[bool]:
        trainer = TrainerRanks(ranks)
        return [(await trainer.next_bucket()).last for _ in range(4)]

    assert asyncio.run(scenario()) == [False, False, True, False]
    assert [rank.asked for rank in ranks] == [[("next_bucket",)] * 4, *[[("gather_along",)] * 2] * 2]


def test_a_rank_that_is_lost_in_a_gather_is_named() -> None:
    lost = Rank(1, error=WorkerLost("trainer-1", "killed"))
    with pytest.raises(WorkerLost, match="trainer-1"):
        asyncio.run(TrainerRanks([Rank(0), lost]).next_bucket())


def test_a_gather_that_is_dropped_is_brought_to_its_end_on_all_ranks() -> None:
    ranks = [Rank(0), Rank(1)]
    ranks[1].delay = 0.02

    async def scenario() -> None:
        trainer = TrainerRanks(ranks)
        await trainer.next_bucket()
        await trainer.drop_group()
        await trainer.next_bucket()

    asyncio.run(scenario())
    assert ranks[0].asked == [("next_bucket",), ("drop_group",), ("next_bucket",)]
    assert ranks[1].asked == [("gather_along",)] * 2


def test_the_first_rank_writes_weights_and_the_others_gather_along() -> None:
    ranks = [Rank(0), Rank(1)]
    packet = asyncio.run(WrittenWeights(TrainerRanks(ranks)).weights(3))
    assert packet.version == 3
    assert [rank.asked for rank in ranks] == [[("write_weights", 3)], [("gather_along",)]]
