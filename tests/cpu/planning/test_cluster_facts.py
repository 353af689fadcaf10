"""What is asked of a cluster before anything is submitted to it, and how it may fail."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from loopback import Quiet, Server, serving

from miles.errors import ConfigError, Unavailable
from miles.planning.facts.cluster import job_server, probe, read_cluster
from miles.planning.workers import WorkersPlan

NODES = [
    {"state": "ALIVE", "resources_total": {"CPU": 8.0, "GPU": 2.0}},
    {"state": "ALIVE", "resources_total": {"CPU": 4.0}},
    {"state": "DEAD", "resources_total": {"CPU": 64.0}},
]


@pytest.fixture
def head(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that answers as Ray's job server does; it wants the token `secret`."""
    nodes = getattr(request, "param", NODES)

    class Handler(Quiet):
        def do_GET(self) -> None:
            given = self.headers.get("Authorization")
            allowed = given == "Bearer secret"
            version = {"ray_version": "2.60.0"}
            body = version if self.path == "/api/version" else {"data": {"result": {"result": nodes}}}
            self.answer(200 if allowed else 403 if given else 401, json.dumps(body).encode())

    with serving(Server(Handler)) as server:
        yield server.url


@pytest.fixture(autouse=True)
def no_token(monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("http://head:8265", "http://head:8265"),
        ("head", "http://head:9000"),
        ("head:8266", "http://head:8266"),
        ("https://head", "https://head:9000"),
    ],
)
def test_an_address_may_leave_out_scheme_and_port(address: str, url: str) -> None:
    assert job_server(address, 9000) == url


def test_the_address_of_another_server_is_refused_with_the_right_one() -> None:
    with pytest.raises(ConfigError, match="http://head:8265"):
        job_server("ray://head:10001", 8265)


def test_living_nodes_are_added_up(head: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    facts = read_cluster(head)
    assert (facts.nodes, facts.cpus, facts.gpus, facts.ray_version) == (2, 12.0, 2.0, "2.60.0")


def test_the_token_may_lie_in_its_file(head: str, tmp_path: Any) -> None:
    (tmp_path / "token").write_text("secret\n")
    assert read_cluster(head).nodes == 2


def test_a_missing_and_a_wrong_token_are_told_apart(head: str, monkeypatch: Any) -> None:
    with pytest.raises(Unavailable, match="asks for a token"):
        read_cluster(head)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(Unavailable, match="refuses the token"):
        read_cluster(head)


@pytest.mark.parametrize("head", [[]], indirect=True)
def test_a_cluster_without_a_living_node_is_not_there_yet(head: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    with pytest.raises(Unavailable, match="no living node"):
        read_cluster(head)


def test_a_dead_address_is_refused() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(Unavailable, match="does not answer"):
            probe(url)


def test_what_a_run_needs_is_added_up_in_words() -> None:
    workers = WorkersPlan(trainers=2, engines=3, reward_workers=1, threads=4)
    assert workers.cpus == 22
    assert workers.arithmetic == "driver 1 + trainers 2 × 4 + engines 3 × 4 + reward workers 1 × 1 = 22 CPU"
