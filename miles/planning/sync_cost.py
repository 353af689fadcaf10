"""What one weight update costs at scale: bytes on each link, and seconds at the speed of that link.

A lower bound: links run at their rate, steps of one bucket overlap with the next, and nothing waits. What was
measured of other systems lies between one and two and a half times above it (`PUBLISHED`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from miles.planning.formats import Format
from miles.planning.layout import Layout
from miles.planning.model_shape import ModelShape

Transport = Literal["broadcast", "point-to-point", "colocated"]

NVLINK_BYTES = 450e9
"""Bytes per second that one H100 sends over NVLink (900 GB/s both ways, NVIDIA's data sheet)."""
NETWORK_BYTES = 50e9
"""Bytes per second and GPU between nodes: one 400 Gb/s adapter each."""


@dataclass(frozen=True)
class LinkLoad:
    """Bytes through the busiest link of one kind."""

    what: str
    link: Literal["NVLink", "network"]
    bytes: int

    @property
    def seconds(self) -> float:
        return self.bytes / (NVLINK_BYTES if self.link == "NVLink" else NETWORK_BYTES)


@dataclass(frozen=True)
class SyncCost:
    """One update. Gathering, transfer and loading overlap bucket by bucket: the slowest link decides."""

    transport: Transport
    loads: tuple[LinkLoad, ...]

    @property
    def slowest(self) -> LinkLoad:
        return max(self.loads, key=lambda load: load.seconds)

    @property
    def seconds(self) -> float:
        return self.slowest.seconds


@dataclass(frozen=True)
class SyncShape:
    """Who sends what to whom. `changed`: share of bytes that a delta update sends (1: all of them)."""

    model: ModelShape
    layout: Layout
    plain: Format
    sent: Format
    """Format on the wire: quantised before it is sent, where the engine holds quantised weights."""
    engines: int
    gpus_per_engine: int
    gpus_per_node: int = 8
    changed: float = 1.0

    @property
    def wire_bytes(self) -> int:
        """The whole model as it is sent."""
        return int(self.model.stored_bytes(self.sent, self.plain) * self.changed)


def sync_cost(shape: SyncShape, transport: Transport) -> SyncCost:
    """The loads of one transport.

    broadcast: the first rank of every pipeline stage gathers its layers and sends them to all engine GPUs;
    each of those receives the whole model, and keeps its part. point-to-point: every engine GPU receives its
    part alone, from any rank that holds it. colocated: the engine's GPUs are the trainer's; a GPU takes what
    its own node holds over NVLink, and the rest over the network, each adapter of the node a share.
    """
    makers = {"broadcast": _broadcast, "point-to-point": _point_to_point, "colocated": _colocated}
    return SyncCost(transport, tuple(makers[transport](shape)))


def _gather(shape: SyncShape) -> Iterator[LinkLoad]:
    """What the first rank of a pipeline stage receives, to hold whole tensors of its layers."""
    layout, model = shape.layout, shape.model
    experts = model.stored_bytes(shape.plain) * model.experts // model.total
    dense = model.stored_bytes(shape.plain) - experts
    if layout.tp > 1:
        yield LinkLoad("gather over TP", "NVLink", int(dense / layout.pp * (1 - 1 / layout.tp)))
    ranks = layout.ep * layout.etp
    if experts and ranks > 1:
        near = min(ranks, shape.gpus_per_node)
        stage = experts / layout.pp
        yield LinkLoad("gather over EP", "NVLink", int(stage * (near - 1) / ranks))
        if ranks > near:
            yield LinkLoad("gather over EP between nodes", "network", int(stage * (ranks - near) / ranks))


def _broadcast(shape: SyncShape) -> Iterator[LinkLoad]:
    yield from _gather(shape)
    yield LinkLoad("every stage sends its layers", "network", shape.wire_bytes // shape.layout.pp)
    yield LinkLoad("every engine GPU receives the model", "network", shape.wire_bytes)


def _point_to_point(shape: SyncShape) -> Iterator[LinkLoad]:
    part = shape.wire_bytes // shape.gpus_per_engine
    yield LinkLoad("every trainer GPU sends its share", "network", _per_trainer(shape))
    yield LinkLoad("every engine GPU receives its part", "network", part)


def _per_trainer(shape: SyncShape) -> int:
    return shape.wire_bytes * shape.engines // shape.layout.world


def _colocated(shape: SyncShape) -> Iterator[LinkLoad]:
    nodes = max(1, shape.gpus_per_engine // shape.gpus_per_node)
    ranks = min(shape.gpus_per_node, shape.layout.world)
    held = min(1.0, ranks * nodes / _ranks_of_one_copy(shape.layout))
    part = shape.wire_bytes / shape.gpus_per_engine
    yield LinkLoad("from the own node", "NVLink", int(part * held))
    if held < 1:
        yield LinkLoad("from other nodes", "network", int(part * (1 - held)))


def _ranks_of_one_copy(layout: Layout) -> int:
    """Ranks that together hold every weight once."""
    return layout.pp * max(layout.tp, layout.ep * layout.etp)


CHUNK_BYTES = 4 * 1024**2 // 8
"""What NCCL's ring passes on at once: one of the eight steps of its 4 MiB buffer."""


@dataclass(frozen=True)
class FanOut:
    """Seconds of an update that leaves the trainer by its first rank alone, as miles' own broadcast does.

    gathered: that rank receives what its node does not hold. Then its adapter sends the model to a group of
    each server in turn (`per_server`), along gloo's binomial tree (`binomial`: one copy for each doubling of
    the ranks), or along NCCL's ring (`ring`: once, and a bucket has arrived when its last chunk has gone
    round).
    """

    gathered: float
    per_server: float
    binomial: float
    ring: float


def fan_out(shape: SyncShape, bucket_bytes: int) -> FanOut:
    """The ways from one rank to all engine GPUs; links as in `sync_cost`."""
    once = shape.wire_bytes / NETWORK_BYTES
    ranks = 1 + shape.engines * shape.gpus_per_engine
    held = min(1.0, shape.gpus_per_node / _ranks_of_one_copy(shape.layout))
    between = math.ceil(ranks / shape.gpus_per_node)
    round_s = CHUNK_BYTES * (between / NETWORK_BYTES + (ranks - between) / NVLINK_BYTES)
    return FanOut(
        gathered=shape.model.stored_bytes(shape.plain) * (1 - held) / NETWORK_BYTES,
        per_server=once * shape.engines,
        binomial=once * math.ceil(math.log2(ranks)),
        ring=once + math.ceil(shape.wire_bytes / bucket_bytes) * round_s,
    )


@dataclass(frozen=True)
class Published:
    """A measured update of another system: NCCL broadcast, then RDMA point to point, in milliseconds."""

    model: str
    parameters: float
    broadcast_ms: int
    point_to_point_ms: int

    @property
    def bound_ms(self) -> float:
        """The broadcast's lower bound in bf16 at one 400 Gb/s adapter per GPU."""
        return 1e3 * 2 * self.parameters / NETWORK_BYTES


PUBLISHED = (
    Published("30B", 30.5e9, 2_670, 2_160),
    Published("106B", 106e9, 5_001, 2_637),
    Published("235B", 235e9, 10_754, 3_162),
    Published("744B", 744e9, 58_302, 8_480),
    Published("1T (Kimi K2)", 1.04e12, 53_279, 7_227),
)
"""From miles' page on point-to-point weight transfer (docs/advanced/p2p-weight-transfer.md)."""
