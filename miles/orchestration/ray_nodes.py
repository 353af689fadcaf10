"""Which machine each worker runs on, and what its loss takes away."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray

from miles.errors import RunError

T = TypeVar("T")

CONNECT_SECONDS = 2.0
SETTLE_SECONDS = 60.0


@dataclass(frozen=True)
class NodeLost:
    """A machine that left the cluster, and the workers that ran there."""

    address: str
    workers: tuple[str, ...]


def answers(node: dict[str, Any]) -> bool:
    """Whether a machine's own Ray server still takes connections. The cluster notices seconds later."""
    try:
        socket.create_connection(
            (node["NodeManagerAddress"], node["NodeManagerPort"]), CONNECT_SECONDS
        ).close()
    except OSError:
        return False
    return True


@dataclass
class NodeBook:
    """Where the workers of a run are. `nodes` tells the cluster's machines as `ray.nodes()` does."""

    nodes: Callable[[], list[dict[str, Any]]] = ray.nodes
    answers: Callable[[dict[str, Any]], bool] = answers
    _homes: dict[str, str] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)

    def moved_in(self, worker: str, node_id: str) -> None:
        """A worker has started on a node."""
        self._homes[worker] = node_id

    def lost_with(self, worker: str) -> NodeLost | None:
        """The node that died with this worker; told once, None where only the process died."""
        home = self._homes.get(worker)
        if home is None or home in self._told:
            return None
        node = next((node for node in self.nodes() if node["NodeID"] == home), None)
        if node is not None and node["Alive"] and self.answers(node):
            return None
        self._told.add(home)
        there = tuple(sorted(name for name, place in self._homes.items() if place == home))
        return NodeLost("a machine" if node is None else node["NodeManagerAddress"], there)

    async def settle(self) -> None:
        """Return when the cluster, too, knows of every lost node: it would place workers there before."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while any(node["Alive"] and node["NodeID"] in self._told for node in self.nodes()):
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(0.5)


async def within(seconds: float, worker: str, ready: Awaitable[T]) -> T:
    """The answer of a worker that is being started. Raises: RunError when there is no room for it."""
    try:
        return await asyncio.wait_for(ready, seconds)
    except TimeoutError:
        total, free = ray.cluster_resources(), ray.available_resources()
        alive = sum(node["Alive"] for node in ray.nodes())
        raise RunError(
            f"the cluster has no room for {worker}",
            why=f"nodes left: {alive}, with {total.get('CPU', 0):g} CPU, {free.get('CPU', 0):g} of them "
            f"free; none came within {seconds:g} s (worker_start_timeout)",
            fix="add a node, then go on from the last checkpoint: miles runs resume RUN",
        ) from None
