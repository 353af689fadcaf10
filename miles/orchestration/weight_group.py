"""One process group of a trainer and all of its SGLang servers, through which weights are broadcast.

Rank 0 is the trainer's first rank, the GPUs of the servers follow in the order of their seats. gloo
broadcasts along a binomial tree and NCCL along a ring, so the trainer's link does not carry the weights once
for every server (docs/cluster.md). Every group has a name of its own: a server may outlive the run.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from miles.rollout.sglang.control import UpdateFailed
from miles.rollout.sglang.weight_payload import Meeting
from miles.training.native.process_group import (
    JOIN_TIMEOUT_S,
    LOOPBACK,
    off_loopback,
    on_loopback,
    open_store,
)

T = TypeVar("T")

BUCKET_S = 300.0
"""Seconds for one bucket at most."""

MEET_S = 60.0
"""Seconds for all to meet at most: less than a server's own request may take, so that this end, which waits
for all, gives up first and the others are told."""

LINGER_S = 2.0
"""Seconds that a meeting which broke off is open for those on their way: torch looks for a store that is gone
for as long as for one that is not there yet."""


class WeightGroup:
    """Rank 0's end. It listens from the beginning, and has a group once it `joined`."""

    def __init__(self, host: str, size: int, device: str, timeout_s: float = BUCKET_S) -> None:
        """`size`: ranks with this one. Raises: RunError when `host` cannot be listened on."""
        self._store: dist.TCPStore | None = open_store(host)
        self._device, self._timeout_s = device, timeout_s
        self._meeting_now = False
        backend, name = "nccl" if device == "cuda" else "gloo", f"miles-{uuid.uuid4().hex}"
        self.meeting = Meeting(host, int(self._store.port), name, size, backend)
        # Not the store itself, which ends the waiting of all when it is let go.
        limit = timedelta(seconds=JOIN_TIMEOUT_S)
        self._client = dist.TCPStore(host, self.meeting.port, is_master=False, timeout=limit)
        self._group: dist.ProcessGroup | None = None

    async def join(self) -> None:
        """Return when all ranks have come. Raises: UpdateFailed, and lets go of those that have."""
        failure = f"process group {self.meeting.name} was not formed"
        limit = min(MEET_S, self._timeout_s)
        self._meeting_now = True
        try:
            async with asyncio.timeout(limit):
                await _beside(self._form, failure)
        except TimeoutError:
            self.leave()
            raise UpdateFailed(failure, why=f"not all servers had come within {limit:g} s") from None
        finally:
            self._meeting_now = False

    async def send(self, tensors: Sequence[Tensor], version: int) -> None:
        """Broadcast them, in their order; returns when they are with the others. Raises: UpdateFailed."""
        await _beside(lambda: self._send(tensors), f"weight version {version} broke off")

    async def linger(self) -> None:
        """Return when a meeting that broke off can be left."""
        if self._meeting_now:
            await asyncio.sleep(LINGER_S)

    def leave(self) -> None:
        """Let go: ranks that still wait for this one, or for others to come, are told by the end of its
        connections, those of its store among them.
        """
        self._store = None
        group, self._group = self._group, None
        if group is not None:
            dist.destroy_process_group(group)

    def _form(self) -> None:
        """As the server does it: a group beside the default one, which need not be there."""
        meeting = self.meeting
        (on_loopback if meeting.host == LOOPBACK else off_loopback)()
        group, _ = distributed_c10d._new_process_group_helper(
            meeting.size,
            0,
            [],
            dist.Backend(meeting.backend),
            dist.PrefixStore(meeting.name, self._client),
            group_name=meeting.name,
            timeout=timedelta(seconds=self._timeout_s),
        )
        distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(meeting.size)}
        self._group = group
        if self._store is None:
            self.leave()
            raise RuntimeError("it was let go of meanwhile")

    def _send(self, tensors: Sequence[Tensor]) -> None:
        group = self._group
        assert group is not None, "a group is joined before anything is sent through it"
        if self._device != "cuda":
            self._broadcast(group, tensors)
            return
        # On a stream of its own, so that the trainer's gathers the next bucket meanwhile.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            self._broadcast(group, tensors)
        stream.synchronize()

    def _broadcast(self, group: dist.ProcessGroup, tensors: Sequence[Tensor]) -> None:
        on_device = [tensor.detach().to(self._device).contiguous() for tensor in tensors]
        works = [group.broadcast(tensor, 0) for tensor in on_device]
        for work in works:
            work.wait()


async def _beside(call: Callable[[], T], failure: str) -> T:
    """The result of a call in a thread that nobody waits for at the end of the process: it may hang for as
    long as `BUCKET_S`. Raises: UpdateFailed for what torch raises.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: RuntimeError | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(result)  # type: ignore[arg-type]
        else:
            done.set_exception(UpdateFailed(failure, why=str(error).splitlines()[0]))

    def run() -> None:
        result, error = None, None
        try:
            result = call()
        except RuntimeError as broken:
            # Without its frames, which hold the group and so its connections.
            error = broken.with_traceback(None)
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="weight-group", daemon=True).start()
    return await done
