"""The driver's side of a worker process: plain methods over actor calls, deaths as WorkerLost."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Collection, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from miles.data.sample import Sample
from miles.orchestration.route_wire import pack_samples, unpack_answer
from miles.orchestration.sglang_servers import DiskPacket
from miles.orchestration.turns import Held
from miles.orchestration.weight_packets import Manifest, WeightsDamaged
from miles.orchestration.worker_loss import WorkerLost
from miles.rollout.engine import EngineHealth, GenerateRequest
from miles.rollout.sglang.control import MemoryTag
from miles.rollout.sglang.weight_payload import Announced, Meeting
from miles.training.trainer import TrainResult

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles.orchestration.engine_pool import Answer


@contextmanager
def translated(worker: str) -> Iterator[None]:
    """Ray's errors as ours: a lost process is WorkerLost, what a worker raised is raised here again."""
    try:
        yield
    except RayActorError as death:
        raise WorkerLost(worker, _reason(death)) from death
    except RayTaskError as failed:
        if isinstance(failed.cause, ObjectLostError):
            raise WeightsDamaged(f"an object on its way to {worker} was lost") from failed
        # The remote traceback stays readable as the cause.
        raise failed.cause from failed


async def answer(worker: str, call: Awaitable[Any]) -> Any:
    """The result of one actor call."""
    with translated(worker):
        return await call


def _reason(death: RayActorError) -> str:
    """One line for people from Ray's report of a death."""
    lines = [line.strip() for line in str(death).splitlines() if line.strip()]
    told = next((line for line in lines if "actor is dead because" in line), lines[0] if lines else "")
    return told.partition(" Some common causes")[0]


class Handle:
    """A worker process by name."""

    def __init__(self, name: str, actor: Any, pid: int) -> None:
        self.name, self.pid, self._actor = name, pid, actor

    def kill(self) -> None:
        ray.kill(self._actor)


@dataclass(frozen=True)
class Packet:
    """Weights that lie in the object store."""

    manifest: Manifest
    weights: Any
    """An object reference; the driver never fetches what it points to."""


class RayTrainer(Handle):
    """A trainer rank in a process of its own (`trainer_ranks.TrainerRank`)."""

    async def node(self) -> str:
        node: str = await answer(self.name, self._actor.node.remote())
        return node

    async def open_store(self, host: str) -> int:
        port: int = await answer(self.name, self._actor.open_store.remote(host))
        return port

    async def join(self, rank: int, size: int, meeting: tuple[str, int] | None) -> None:
        await answer(self.name, self._actor.join.remote(rank, size, meeting))

    def share(self, samples: Sequence[Sample]) -> Any:
        """A reference into the object store, which every rank reads; routes travel compact."""
        return ray.put(pack_samples(samples))

    async def train(self, shared: Any) -> TrainResult:
        result: TrainResult = await answer(self.name, self._actor.train.remote(shared))
        return result

    async def update_reference(self) -> None:
        await answer(self.name, self._actor.update_reference.remote())

    async def set_knobs(self, patch: Mapping[str, float]) -> None:
        await answer(self.name, self._actor.set_knobs.remote(dict(patch)))

    async def save(self, directory: Path, *, optimizer: bool = True) -> None:
        await answer(self.name, self._actor.save.remote(directory, optimizer))

    async def saved(self, *, wait: bool) -> bool:
        done: bool = await answer(self.name, self._actor.saved.remote(wait))
        return done

    async def load(self, directory: Path) -> None:
        await answer(self.name, self._actor.load.remote(directory))

    async def weights(self, version: int) -> Packet:
        manifest, weights = self._actor.weights.options(num_returns=2).remote(version)
        return Packet(await answer(self.name, manifest), weights)

    async def write_weights(self, version: int) -> DiskPacket:
        packet: DiskPacket = await answer(self.name, self._actor.write_weights.remote(version))
        return packet

    async def hold(self, held: Held) -> None:
        await answer(self.name, self._actor.hold.remote(held))

    async def next_handles(self, version: int) -> tuple[str, bool]:
        given: tuple[str, bool] = await answer(self.name, self._actor.next_handles.remote(version))
        return given

    async def drop_handles(self) -> None:
        await answer(self.name, self._actor.drop_handles.remote())

    async def open_group(self, host: str, size: int) -> Meeting:
        meeting: Meeting = await answer(self.name, self._actor.open_group.remote(host, size))
        return meeting

    async def join_group(self) -> None:
        await answer(self.name, self._actor.join_group.remote())

    async def next_bucket(self) -> Announced:
        announced: Announced = await answer(self.name, self._actor.next_bucket.remote())
        return announced

    async def gather_along(self) -> None:
        await answer(self.name, self._actor.gather_along.remote())

    async def send_bucket(self, version: int) -> None:
        await answer(self.name, self._actor.send_bucket.remote(version))

    async def drop_group(self) -> None:
        await answer(self.name, self._actor.drop_group.remote())

    async def free_port(self) -> int:
        """A port on its node that nobody has now."""
        port: int = await answer(self.name, self._actor.free_port.remote())
        return port

    async def gpu(self) -> str:
        """The number of its GPU on its node; empty without one."""
        found: str = await answer(self.name, self._actor.gpu.remote())
        return found


class RayEngine(Handle):
    """An engine in a process of its own (`engine_pool.RemoteEngine`)."""

    async def generate(self, calls: Sequence[Sequence[GenerateRequest]]) -> AsyncIterator[tuple[int, Answer]]:
        with translated(self.name):
            async for item in self._actor.generate.options(num_returns="streaming").remote(list(calls)):
                index, answer = await item
                yield index, unpack_answer(answer)

    async def abort(self, groups: Collection[int] | None) -> int:
        count: int = await answer(self.name, self._actor.abort.remote(groups))
        return count

    async def load(self, packet: Packet | DiskPacket) -> None:
        if isinstance(packet, DiskPacket):
            await answer(self.name, self._actor.load_checkpoint.remote(packet))
            return
        await answer(self.name, self._actor.load.remote(packet.manifest, packet.weights))

    async def health(self) -> EngineHealth:
        health: EngineHealth = await answer(self.name, self._actor.health.remote())
        return health

    async def metrics(self) -> dict[str, float]:
        metrics: dict[str, float] = await answer(self.name, self._actor.metrics.remote())
        return metrics


class RayServer(RayEngine):
    """An SGLang server (`broadcast_weights.BroadcastSink`), also on a trainer's GPUs (`turns.Releasing`,
    `handle_weights.HandleSink`).
    """

    async def release(self, tags: Sequence[MemoryTag]) -> None:
        await answer(self.name, self._actor.release.remote(tags))

    async def reclaim(self, tags: Sequence[MemoryTag]) -> None:
        await answer(self.name, self._actor.reclaim.remote(tags))

    async def begin_handles(self, version: int) -> bool:
        in_session: bool = await answer(self.name, self._actor.begin_handles.remote(version))
        return in_session

    async def take_handles(self, payloads: Sequence[str], version: int, last: bool) -> None:
        await answer(self.name, self._actor.take_handles.remote(list(payloads), version, last))

    async def end_handles(self, version: int, in_session: bool) -> None:
        await answer(self.name, self._actor.end_handles.remote(version, in_session))

    async def node(self) -> str:
        node: str = await answer(self.name, self._actor.node.remote())
        return node

    async def checksum(self) -> str:
        checksum: str = await answer(self.name, self._actor.checksum.remote())
        return checksum

    async def join_group(self, meeting: Meeting, rank: int) -> None:
        await answer(self.name, self._actor.join_group.remote(meeting, rank))

    async def begin_broadcast(self, version: int) -> None:
        await answer(self.name, self._actor.begin_broadcast.remote(version))

    async def take_broadcast(self, announced: Announced, version: int) -> None:
        await answer(self.name, self._actor.take_broadcast.remote(announced, version))

    async def end_broadcast(self, version: int) -> None:
        await answer(self.name, self._actor.end_broadcast.remote(version))

    async def leave_group(self) -> None:
        await answer(self.name, self._actor.leave_group.remote())


class RayReward(Handle):
    """A scorer in a process of its own."""

    async def score(
        self, samples: Sequence[Sample], evaluation: bool
    ) -> tuple[list[Sample], list[tuple[str, int, str]]]:
        """Judge copies without routes, which no reward function reads and which are the bulk of a sample."""
        light = [replace(sample, rollout_routed_experts=None) for sample in samples]
        judged: tuple[list[Sample], list[tuple[str, int, str]]]
        judged = await answer(self.name, self._actor.score.remote(light, evaluation))
        return judged
