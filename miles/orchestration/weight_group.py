"""A process group of this trainer and one SGLang server, through which weights are broadcast.

Rank 0 is the trainer, the GPUs of the server follow. Every server has a group of its own, so that a lost one
takes no other with it. Every group has a name of its own: a server may outlive the run.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from miles.rollout.sglang.control import UPDATE_S, Control, both
from miles.training.native.process_group import LOOPBACK, on_loopback, open_store


class WeightGroup:
    """Implements `rollout.sglang.control.Broadcaster`. Both sides have joined when `joined` returns it."""

    def __init__(self, name: str, group: dist.ProcessGroup, store: dist.TCPStore, device: str) -> None:
        self.name, self._group, self._device = name, group, device
        self._store = store  # serves the other ranks for as long as there is a group

    @classmethod
    async def joined(cls, control: Control, server_ranks: int, device: str) -> WeightGroup:
        """Form a group with a server on this machine. Raises: ConnectionLost, UpdateFailed."""
        name, backend = f"miles-{uuid.uuid4().hex}", "nccl" if device == "cuda" else "gloo"
        store = open_store(LOOPBACK)
        on_loopback()
        size = 1 + server_ranks
        told = control.join_group(LOOPBACK, store.port, size, name, backend)
        ours = asyncio.to_thread(_become_first, store, size, name, backend)
        group = await both(told, ours, f"process group {name} was not formed")
        return cls(name, group, store, device)

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Broadcast them, in their order; returns when the server has them all."""
        on_device = [tensor.to(self._device).contiguous() for tensor in tensors]
        works = [self._group.broadcast(tensor, 0) for tensor in on_device]
        for work in works:
            work.wait()


def _become_first(store: dist.TCPStore, size: int, name: str, backend: str) -> dist.ProcessGroup:
    """As the server does it: a group beside the default one, which need not be there."""
    group, _ = distributed_c10d._new_process_group_helper(
        size,
        0,
        [],
        dist.Backend(backend),
        dist.PrefixStore(name, store),
        group_name=name,
        timeout=timedelta(seconds=UPDATE_S),
    )
    return group
