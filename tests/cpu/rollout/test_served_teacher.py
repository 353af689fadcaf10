"""A served teacher: what it is asked, whom it advises, and answers that are not of the response."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from loopback import Quiet, Server, serving

from miles.data.batch import pack
from miles.data.sample import Sample, SampleStatus
from miles.errors import ConfigError, DataError, RunError
from miles.rollout.served_teacher import ServedTeachers


class TeacherServer(Server):
    """Answers as SGLang documents it, `skip` tokens fewer."""

    def __init__(self) -> None:
        super().__init__(Handler)
        self.questions: list[dict[str, Any]] = []
        self.skip = 0


class Handler(Quiet):
    server: TeacherServer

    def do_POST(self) -> None:
        question = self.question()
        self.server.questions.append(question)
        ids = question["input_ids"][question["logprob_start_len"] :]
        triples = [[None if i == 0 else -token / 10, token, None] for i, token in enumerate(ids)]
        triples = triples[: len(triples) - self.server.skip]
        body = json.dumps({"text": "", "meta_info": {"input_token_logprobs": triples}}).encode()
        self.answer(200 if self.path == "/generate" else 404, body)


@pytest.fixture
def server() -> Iterator[TeacherServer]:
    with serving(TeacherServer()) as server:
        yield server


def sample(tokens: list[int], response: int, **metadata: str) -> Sample:
    return Sample(
        "?",
        tokens=tokens,
        response_length=response,
        reward=0.0,
        status=SampleStatus.COMPLETED,
        rollout_log_probs=np.full(response, -1.0, np.float32),
        metadata=dict(metadata),
    )


def advise(urls: list[str], *samples: Sample) -> None:
    asyncio.run(ServedTeachers(urls, "teacher", pause_s=0.001).advise(samples))


def test_every_response_token_gets_the_teachers_log_prob(server: TeacherServer) -> None:
    samples = [sample([5, 6, 7, 8], 2), sample([5, 3], 1)]
    advise([server.url], *samples)
    batch = pack([Sample.from_dict(json.loads(json.dumps(each.to_dict()))) for each in samples])
    assert batch.teacher_log_probs is not None
    np.testing.assert_allclose(batch.teacher_log_probs, [np.nan, -0.7, -0.8, -0.3])
    question = next(each for each in server.questions if len(each["input_ids"]) == 4)
    assert question["sampling_params"]["max_new_tokens"] == 0 and question["logprob_start_len"] == 1
    assert question["return_logprob"] is True


def test_without_a_teacher_a_batch_has_no_advice() -> None:
    assert pack([sample([5, 6, 7], 2)]).teacher_log_probs is None


def test_a_sample_names_its_teacher(server: TeacherServer) -> None:
    mine = sample([1, 2, 3], 2, teacher="math")
    advise([f"math={server.url}", "code=127.0.0.1:1"], mine)
    assert mine.teacher_log_probs is not None
    with pytest.raises(DataError, match="no teacher is called 'art'"):
        advise([f"math={server.url}", f"code={server.url}"], sample([1, 2, 3], 2, teacher="art"))
    with pytest.raises(ConfigError, match="has no name"):
        ServedTeachers([server.url, "b:1"], "teacher")


def test_log_probs_of_something_else_are_refused(server: TeacherServer) -> None:
    server.skip = 1
    with pytest.raises(RunError, match="not those of the response"):
        advise([server.url], sample([1, 2, 3, 4], 2))
