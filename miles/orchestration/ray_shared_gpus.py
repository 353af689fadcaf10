"""Servers on the GPUs of a trainer's ranks: which GPUs each has, and over which nodes it lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from miles.errors import Unavailable

if TYPE_CHECKING:
    from miles.orchestration.ray_handles import RayTrainer


@dataclass(frozen=True)
class Placed:
    """One rank of the trainer: its worker, the address of its node, its GPU there, and its bundle."""

    trainer: RayTrainer
    node: str
    gpu: str
    bundle: int


@dataclass(frozen=True)
class ServerPart:
    """The part of a server on one node."""

    bundle: int
    gpus: tuple[str, ...]
    args: dict[str, Any]
    """What this part is told beside the arguments of the plan."""


def in_rank_order(placed: Sequence[Placed]) -> list[Placed]:
    """Node by node, and within a node in the order of its GPUs, as servers number theirs."""
    return sorted(placed, key=lambda rank: (rank.node, int(rank.gpu or 0)))


def server_parts(ranks: Sequence[Placed], port: int) -> list[ServerPart]:
    """The parts of the server that lies on the GPUs of these ranks.

    `port`: one that is free on the first node, where the parts meet. Raises: Unavailable when nodes have
    unequal shares of them, which no server can use.
    """
    nodes = [list(group) for _, group in groupby(ranks, key=lambda rank: rank.node)]
    if len({len(node) for node in nodes}) > 1:
        shares = ", ".join(f"{len(node)} on {node[0].node}" for node in nodes)
        raise Unavailable("a server lies on unequal parts of nodes", why=shares, fix="use whole nodes")
    meeting = {"nnodes": len(nodes), "dist_init_addr": f"{ranks[0].node}:{port}"} if len(nodes) > 1 else {}
    return [
        ServerPart(
            bundle=node[0].bundle,
            gpus=tuple(rank.gpu for rank in node),
            args=meeting | {"node_rank": number} if meeting else {},
        )
        for number, node in enumerate(nodes)
    ]
