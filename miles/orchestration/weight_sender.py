"""The trainer's end of a broadcast: weights of one moment, cut into buckets, one of them on its way while the
next is gathered and transformed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b

import torch
from torch import Tensor

from miles.orchestration.weight_group import BUCKET_S, WeightGroup
from miles.rollout.sglang.control import UpdateFailed
from miles.rollout.sglang.weight_payload import Announced, Bucket, Meeting, buckets

Named = Iterable[tuple[str, Tensor]]


class WeightSender:
    """Holds two buckets at most: the one that is sent, and the next.

    `weights`: reads what the servers are to hold now; with several ranks it is a collective, which every call
    iterates to its end. `delta`: tensors whose bytes this group was given last are left out. `timeout_s`: for
    one bucket; other ranks of the trainer wait for its next one in a collective meanwhile.
    """

    def __init__(
        self,
        weights: Callable[[], Named],
        bucket_bytes: int,
        device: str,
        delta: bool = False,
        timeout_s: float = BUCKET_S,
    ) -> None:
        self._weights, self._bucket_bytes, self._device = weights, bucket_bytes, device
        self._delta, self._timeout_s = delta, timeout_s
        self._group: WeightGroup | None = None
        self._given: dict[str, bytes] = {}
        """Under `delta`: digests of what every member of the group holds."""
        self._seen: dict[str, bytes] = {}
        self._cut: Iterator[tuple[Bucket, bool]] | None = None
        self._ready: deque[Bucket] = deque()
        # One thread for all of a gather: grad mode belongs to a thread.
        self._gathering = ThreadPoolExecutor(1, "gather-weights")

    def open(self, host: str, size: int) -> Meeting:
        """Begin a group of `size` ranks, this one with them, in place of the last."""
        self._leave()
        self._group = WeightGroup(host, size, self._device, self._timeout_s)
        return self._group.meeting

    async def join(self) -> None:
        """Return when all ranks have come. Raises: UpdateFailed."""
        assert self._group is not None, "a group is opened before it is joined"
        await self._group.join()

    async def next_bucket(self) -> Announced:
        """Gather the next bucket of the weights; the first one after the last begins anew."""
        return await asyncio.get_running_loop().run_in_executor(self._gathering, self._gather)

    async def send_bucket(self, version: int) -> None:
        """Broadcast the bucket that was gathered first. Raises: UpdateFailed, and leaves the group."""
        assert self._group is not None, "weights are sent to a group"
        bucket = self._ready.popleft()
        try:
            await self._group.send([tensor for _, tensor in bucket], version)
        except UpdateFailed:
            self._leave()
            raise

    async def drop(self) -> None:
        """After a broadcast that broke off: leave the group, and bring what is being gathered to its end."""
        if self._group is not None:
            await self._group.linger()
        self._leave()
        await asyncio.get_running_loop().run_in_executor(self._gathering, self._drain)

    def _leave(self) -> None:
        self._given, self._seen = {}, {}
        if self._group is not None:
            self._group.leave()
        self._group = None

    def _gather(self) -> Announced:
        if self._cut is None:
            self._seen = {}
            named = self._changed(self._weights()) if self._delta else self._weights()
            self._cut = buckets(named, self._bucket_bytes)
        bucket, last = next(self._cut)
        if last:
            self._cut, self._given = None, self._seen
        self._ready.append(bucket)
        return Announced.of(bucket, last)

    def _drain(self) -> None:
        for _ in self._cut or ():
            pass
        self._cut = None
        self._ready.clear()
        self._given, self._seen = {}, {}

    def _changed(self, weights: Named) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            digest = self._seen[name] = _digest(tensor)
            if self._given.get(name) != digest:
                yield name, tensor


def _digest(tensor: Tensor) -> bytes:
    """128 bits over the bytes of a tensor."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return blake2b(raw.numpy().data, digest_size=16).digest()
