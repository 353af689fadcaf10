"""Weights from the ranks of a trainer to servers on the same GPUs, by handle: nothing leaves a GPU.

Each rank gathers the same bucket on its own GPU; a server is given the handles of those ranks that share its
GPUs, in the order of its tensor-parallel ranks. A bucket is freed when every server has copied it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from miles.errors import RunError


class HandleSource(Protocol):
    """All ranks of a trainer."""

    async def next_handles(self, version: int) -> tuple[list[str], bool]:
        """The next bucket of the weights as a payload of each rank, and whether it is the last one."""

    async def drop_handles(self) -> None:
        """Free the bucket that was given last."""


class HandleSink(Protocol):
    """One server on the trainer's GPUs. Every method may raise WorkerLost."""

    async def begin_handles(self, version: int) -> bool: ...

    async def take_handles(self, payloads: Sequence[str], version: int, last: bool) -> None: ...

    async def end_handles(self, version: int, in_session: bool) -> None: ...


class HandleWeights:
    """Implements `weight_sync.WeightSync`. `gpus`: of one server; server i has those from i * gpus on."""

    def __init__(self, trainer: HandleSource, servers: Sequence[HandleSink], gpus: int) -> None:
        self._trainer, self._servers, self._gpus = trainer, servers, gpus

    async def send(self, version: int) -> None:
        """Raises: WorkerLost when a server is gone, RunError when ranks and GPUs are not one for one."""
        sessions = await asyncio.gather(*(server.begin_handles(version) for server in self._servers))
        last = False
        while not last:
            payloads, last = await self._trainer.next_handles(version)
            if len(payloads) != len(self._servers) * self._gpus:
                have = f"{len(payloads)} trainer ranks, {len(self._servers)} servers of {self._gpus} GPUs"
                raise RunError("trainer and servers do not share GPUs one for one", why=have)
            await asyncio.gather(
                *(
                    server.take_handles(payloads[i * self._gpus : (i + 1) * self._gpus], version, last)
                    for i, server in enumerate(self._servers)
                )
            )
            await self._trainer.drop_handles()
        await asyncio.gather(
            *(
                server.end_handles(version, session)
                for server, session in zip(self._servers, sessions, strict=True)
            )
        )
