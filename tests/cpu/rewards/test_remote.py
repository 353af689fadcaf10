"""A reward server on loopback: what it is asked, how often, and what becomes of its moods."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator

import pytest
from loopback import Quiet, Server, serving

from miles import patient_client
from miles.data.sample import Sample, SampleStatus
from miles.errors import ConfigError, Unavailable
from miles.rewards.outcome import Outcome, RewardFailure
from miles.rewards.remote import RemoteReward
from miles.rewards.scorer import build_scorer


class RewardServer(Server):
    """Judges by length; `broken` answers are 503 first."""

    def __init__(self) -> None:
        super().__init__(Handler)
        self.broken, self.questions, self.paths = 0, [], []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        self.url += "/judge?by=length"


class Handler(Quiet):
    server: RewardServer

    def do_POST(self) -> None:
        server = self.server
        with server.lock:
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        question = self.question()
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
        self.answer(status, body)


@pytest.fixture
def server() -> Iterator[RewardServer]:
    with serving(RewardServer()) as server:
        yield server


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
