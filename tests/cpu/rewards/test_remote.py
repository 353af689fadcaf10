"""A reward server on loopback: what it is asked, how often, and what becomes of its moods."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from miles import patient_client
from miles.data.sample import Sample, SampleStatus
from miles.errors import ConfigError, Unavailable
from miles.rewards.outcome import Outcome, RewardFailure
from miles.rewards.remote import RemoteReward
from miles.rewards.scorer import build_scorer


class RewardServer(ThreadingHTTPServer):
    """Judges by length; `broken` answers are 503 first."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.broken, self.questions, self.paths = 0, [], []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/judge?by=length"


class Handler(BaseHTTPRequestHandler):
    server: RewardServer

    def do_POST(self) -> None:
        server = self.server
        with server.lock:
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.questions.append(question)
        server.paths.append(self.path)
        status, body = 200, json.dumps(len(question["response"]) / 2).encode()
        if server.broken > 0:
            server.broken -= 1
            status, body = 503, b'{"error": "still loading"}'
        elif question["response"] == "what":
            status, body = 422, b'{"detail": "no such task"}'
        elif question["response"] == "prose":
            body = b"well done"
        with server.lock:
            server.busy -= 1
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def server() -> Iterator[RewardServer]:
    server = RewardServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def judged(url: str, *responses: str) -> list[Outcome]:
    samples = [Sample("2*3", response=r, label="6", status=SampleStatus.COMPLETED) for r in responses]
    return asyncio.run(RemoteReward(url, pause_s=0.001)(samples))


def test_every_response_is_one_question(server: RewardServer) -> None:
    assert judged(server.url, "abc", "a") == [1.5, 0.5]
    assert {"prompt": "2*3", "response": "abc", "label": "6"} in server.questions
    assert set(server.paths) == {"/judge?by=length"}


def test_questions_at_a_time_are_bounded(server: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient_client, "IN_FLIGHT", 3)
    assert judged(server.url, *("a" * 40)) == [0.5] * 40
    assert server.most_busy <= 3


def test_a_server_that_breaks_down_for_a_while_is_asked_again(server: RewardServer) -> None:
    server.broken = 3
    assert judged(server.url, "abc") == [1.5]
    assert len(server.questions) == 4


def test_a_server_that_stays_broken_ends_the_run_in_words(server: RewardServer) -> None:
    server.broken = 99
    with pytest.raises(Unavailable, match="no answer in 6 attempts") as refusal:
        judged(server.url, "abc")
    assert "still loading" in refusal.value.why and server.url in refusal.value.where


def test_no_server_at_all_is_told(server: RewardServer) -> None:
    with pytest.raises(Unavailable, match="no answer"):
        judged("127.0.0.1:1", "abc")


def test_what_it_refuses_is_a_failure_of_that_sample(server: RewardServer) -> None:
    good, refused, prose = judged(server.url, "ab", "what", "prose")
    assert good == 1.0
    assert isinstance(refused, RewardFailure) and "422 no such task" in refused.text
    assert isinstance(prose, RewardFailure) and "not a reward" in prose.text


def test_the_scorer_of_a_run_asks_the_server(server: RewardServer) -> None:
    sample = Sample("2*3", response="abcd", status=SampleStatus.COMPLETED)
    report = asyncio.run(build_scorer("remote_rm", rm_url=server.url).score([sample]))
    assert report.rewards == [2.0], "it needs no label"
    with pytest.raises(ConfigError, match="no server"):
        build_scorer("remote_rm")
