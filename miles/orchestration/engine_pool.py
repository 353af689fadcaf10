"""Several engines behind the protocol of one: prompt groups spread over them, lost engines replaced.

What a sample is depends on its key and the weights only, so it does not matter which engine draws it, nor
whether a first attempt at it was lost with its engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from miles.errors import MilesError
from miles.orchestration.seats import Seat, Worker, call
from miles.orchestration.worker_loss import WorkerLost
from miles.rollout.engine import EngineHealth, GenerateOutput, GenerateRequest, unstarted

Answer = list[GenerateOutput] | MilesError


class RemoteEngine(Worker, Protocol):
    """An engine in another process. Every method may raise WorkerLost."""

    def generate(self, calls: Sequence[Sequence[GenerateRequest]]) -> AsyncIterator[tuple[int, Answer]]:
        """Take up all calls at once; gives (index of the call, its answer) as each is complete."""

    async def abort(self, groups: Collection[int] | None) -> int: ...

    async def load(self, packet: Any) -> None: ...

    async def health(self) -> EngineHealth: ...

    async def metrics(self) -> dict[str, float]: ...


@dataclass(eq=False)
class _Call:
    """One `generate` in flight."""

    requests: Sequence[GenerateRequest]
    done: asyncio.Future[list[GenerateOutput]]


@dataclass(eq=False)
class _Lane:
    """One engine's seat and what it has to do."""

    seat: Seat[RemoteEngine]
    waiting: list[_Call] = field(default_factory=list)
    """Calls of this turn of the event loop; they leave together, so that the engine batches them."""
    unanswered: list[_Call] = field(default_factory=list)
    in_flight: int = 0
    """Tokens of requests that are not answered: their prompts, and the responses at their longest."""

    async def abort(self, groups: Collection[int] | None) -> int:
        """What an engine that is gone was asked ends with nothing, and its successor is not asked."""
        if not self.seat.vacant:
            with suppress(WorkerLost):
                return await self.seat.worker.abort(groups)
        cut = [one for one in self.unanswered if groups is None or one.requests[0].group in groups]
        for one in cut:
            _settle(one, [unstarted() for _ in one.requests])
        return sum(len(one.requests) for one in cut)


class EnginePool:
    """Implements what the collector asks of an engine (`rollout.engine.Engine`) over several of them."""

    def __init__(self, seats: Sequence[Seat[RemoteEngine]]) -> None:
        self._lanes = [_Lane(seat) for seat in seats]
        self._group_lane: dict[int, _Lane] = {}
        self._serving: set[asyncio.Task[None]] = set()

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateOutput]:
        """Answer all requests, in their order, on one engine."""
        if not requests:
            return []
        lane = self._lane_of(requests[0].group)
        call = _Call(requests, asyncio.get_running_loop().create_future())
        if not lane.waiting:
            asyncio.get_running_loop().call_soon(self._dispatch, lane)
        lane.waiting.append(call)
        tokens = sum(len(request.input_ids) + request.sampling.max_new_tokens for request in requests)
        lane.in_flight += tokens
        lane.unanswered.append(call)
        try:
            return await call.done
        finally:
            lane.in_flight -= tokens
            lane.unanswered.remove(call)

    async def abort(self, groups: Collection[int] | None = None) -> int:
        """End the requests of these groups (None: all) with what they have; returns how many."""
        return sum(await asyncio.gather(*(lane.abort(groups) for lane in self._lanes)))

    async def measurements(self) -> list[dict[str, float]]:
        """`metrics` of every engine."""
        lanes = (call(lane.seat, lambda engine: engine.metrics()) for lane in self._lanes)
        return await asyncio.gather(*lanes)

    @property
    def seats(self) -> Sequence[Seat[Any]]:
        return [lane.seat for lane in self._lanes]

    async def checksums(self) -> dict[str, str]:
        """One number over the weights of each SGLang server, by its name."""
        found = await asyncio.gather(*(call(seat, lambda server: server.checksum()) for seat in self.seats))
        return {seat.name: checksum for seat, checksum in zip(self.seats, found, strict=True)}

    def forget_prompts(self) -> None:
        """Engines are about to have other weights: no one of them has a prompt in its cache any more."""
        self._group_lane.clear()

    async def receive(self, packet: Any) -> None:
        """Give every engine new weights; all of them serve the packet's version when this returns.

        Raises: WeightsDamaged when what arrived is not what was sent; the engine keeps its old weights.
        """
        self.forget_prompts()
        await asyncio.gather(*(call(lane.seat, lambda e: e.load(packet)) for lane in self._lanes))

    async def check_health(self, interval: float, timeout: float, first_wait: float) -> None:
        """For as long as this task lives: end an engine that does not answer, so that it is replaced.

        Raises: what a seat that stays empty is given up for (`Seat.replace`).
        """
        await asyncio.sleep(first_wait)
        # Each on its own: a replacement takes minutes.
        checks = [asyncio.create_task(_keep_well(lane.seat, interval, timeout)) for lane in self._lanes]
        try:
            await asyncio.gather(*checks)
        finally:
            for check in checks:
                check.cancel()

    def _lane_of(self, group: int | None) -> _Lane:
        """The engine that has the group's prompt, else the one with the least to do; one that is there."""
        lane = None if group is None else self._group_lane.get(group)
        if lane is None or lane.seat.vacant:
            lane = min(self._lanes, key=lambda lane: (lane.seat.vacant, lane.in_flight))
        if group is not None:
            self._group_lane[group] = lane
        return lane

    def _dispatch(self, lane: _Lane) -> None:
        calls, lane.waiting = lane.waiting, []
        task = asyncio.create_task(_serve(lane.seat, calls))
        self._serving.add(task)
        task.add_done_callback(lambda task: self._on_served(task, calls))

    def _on_served(self, task: asyncio.Task[None], calls: Sequence[_Call]) -> None:
        """Whatever ended the service early ends the calls that still wait for it."""
        self._serving.discard(task)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        for unanswered in calls:
            if not unanswered.done.done() and error is not None:
                unanswered.done.set_exception(error)


async def _serve(seat: Seat[RemoteEngine], calls: Sequence[_Call]) -> None:
    """Answer every call once; what a lost engine had not answered is asked of its successor."""
    unanswered = list(calls)
    # Nobody waits any more for one that was aborted, or cancelled.
    while asked := [call for call in unanswered if not call.done.done()]:
        engine = seat.worker
        try:
            async for index, answer in engine.generate([call.requests for call in asked]):
                unanswered.remove(asked[index])
                _settle(asked[index], answer)
        except WorkerLost as lost:
            await seat.replace(engine, lost)


def _settle(call: _Call, answer: Answer) -> None:
    if call.done.done():  # its caller was cancelled
        return
    if isinstance(answer, MilesError):
        call.done.set_exception(answer)
    else:
        call.done.set_result(answer)


async def _keep_well(seat: Seat[RemoteEngine], interval: float, timeout: float) -> None:
    while True:
        await _check(seat, timeout)
        await asyncio.sleep(interval)


async def _check(seat: Seat[RemoteEngine], timeout: float) -> None:
    engine = seat.worker
    try:
        await asyncio.wait_for(engine.health(), timeout)
    except TimeoutError:
        engine.kill()
        lost = WorkerLost(seat.name, f"it did not answer a health check within {timeout:g} s")
        await seat.replace(engine, lost)
    except WorkerLost as lost:
        await seat.replace(engine, lost)
