"""A lost machine is told once, with everything that ran there; a worker without room ends the run by name."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
import ray

from miles.errors import RunError
from miles.orchestration.ray_nodes import NodeBook, NodeLost, answers, within


def cluster(**alive: bool) -> list[dict[str, Any]]:
    return [
        {"NodeID": name, "Alive": lives, "NodeManagerAddress": f"host-{name}"}
        for name, lives in alive.items()
    ]


def book(nodes: list[dict[str, Any]]) -> NodeBook:
    homes = NodeBook(nodes=lambda: nodes, answers=lambda node: node["NodeID"] != "silent")
    for worker, node in (("trainer-0", "a"), ("engine-0", "b"), ("reward-0", "b")):
        homes.moved_in(worker, node)
    return homes


def test_a_dead_node_is_told_once_with_its_workers() -> None:
    homes = book(cluster(a=True, b=False))
    assert homes.lost_with("engine-0") == NodeLost("host-b", ("engine-0", "reward-0"))
    assert homes.lost_with("reward-0") is None
    assert homes.lost_with("trainer-0") is None


def test_a_dead_process_on_a_living_node_is_no_lost_node() -> None:
    assert book(cluster(a=True, b=True)).lost_with("engine-0") is None
    assert book(cluster(a=True, b=True)).lost_with("never-started") is None


def test_a_node_that_stopped_answering_is_lost_before_the_cluster_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = cluster(a=True, silent=True)
    homes = book(nodes)
    homes.moved_in("engine-1", "silent")
    assert homes.lost_with("engine-1") == NodeLost("host-silent", ("engine-1",))

    async def looked_again(seconds: float) -> None:
        nodes[1]["Alive"] = False

    monkeypatch.setattr(asyncio, "sleep", looked_again)
    asyncio.run(homes.settle())
    assert not nodes[1]["Alive"], "it waits until the cluster knows too"


def test_a_node_answers_while_its_server_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        node = {"NodeManagerAddress": "127.0.0.1", "NodeManagerPort": server.getsockname()[1]}
        assert answers(node)
    assert not answers(node)


def test_a_worker_that_moved_is_looked_for_where_it_went() -> None:
    homes = book(cluster(a=True, b=False, c=True))
    homes.moved_in("engine-0", "c")
    assert homes.lost_with("engine-0") is None
    assert homes.lost_with("reward-0") == NodeLost("host-b", ("reward-0",))


def test_a_worker_without_room_ends_the_run_with_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 0.0})
    monkeypatch.setattr(ray, "nodes", lambda: cluster(a=True, b=False))

    async def never() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RunError) as refused:
        asyncio.run(within(0.01, "engine-0", never()))
    assert "no room for engine-0" in refused.value.what
    assert "nodes left: 1, with 2 CPU, 0 of them free" in refused.value.why
    assert "runs resume" in refused.value.fix
