"""Teachers behind SGLang servers: their log-probs of finished responses (`--use-opd --opd-teacher-urls`)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from miles.data.sample import Sample
from miles.errors import ConfigError, DataError, MilesError, RunError
from miles.http_client import Response
from miles.patient_client import FIRST_PAUSE_S, PatientClient

FLAG = "--opd-teacher-urls"


class ServedTeachers:
    """One teacher for all samples, or several by name, of which a sample's metadata names its own."""

    def __init__(self, urls: Sequence[str], key: str, pause_s: float = FIRST_PAUSE_S) -> None:
        """`urls`: one address, or `name=url` each. Raises ConfigError."""
        named = [_named(url) for url in urls]
        if len(named) > 1 and not all(name for name, _ in named):
            raise ConfigError(
                MilesError("several teachers, and one has no name", where=FLAG, fix="write name=url for each")
            )
        self._key = key
        self._teachers = {
            name: PatientClient(f"{url.rstrip('/')}/generate", "the teacher", FLAG, pause_s)
            for name, url in named
        }

    async def advise(self, samples: Sequence[Sample]) -> None:
        """Set `teacher_log_probs` of every sample.

        Raises: DataError for a sample without a teacher, Unavailable, RunError for an answer of another form.
        """
        by_teacher: dict[str, list[Sample]] = {}
        for sample in samples:
            by_teacher.setdefault(self._teacher_of(sample), []).append(sample)
        await asyncio.gather(*(self._ask(name, asked) for name, asked in by_teacher.items()))

    def _teacher_of(self, sample: Sample) -> str:
        if "" in self._teachers:
            return ""
        name = str(sample.metadata.get(self._key))
        if name not in self._teachers:
            raise DataError(
                f"no teacher is called {name!r}",
                where=f"sample {sample.index}, metadata[{self._key!r}]",
                why=f"{FLAG} names {', '.join(self._teachers)}",
                fix="name the teacher in the row's metadata (--metadata-key)",
            )
        return name

    async def _ask(self, name: str, samples: Sequence[Sample]) -> None:
        teacher = self._teachers[name]
        answers = await teacher.ask_all(_question(sample) for sample in samples)
        for sample, answer in zip(samples, answers, strict=True):
            sample.teacher_log_probs = _read(sample, answer, teacher.url)


def _named(url: str) -> tuple[str, str]:
    """Name and address; an address alone has no name."""
    name, equals, address = url.partition("=")
    return (name, address) if equals and "/" not in name else ("", url)


def _question(sample: Sample) -> dict[str, Any]:
    """Nothing is generated: the server reads the response and reports what it thinks of it."""
    return {
        "input_ids": sample.tokens,
        "sampling_params": {"temperature": 0, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": max(sample.prompt_length - 1, 0),
    }


def _read(sample: Sample, answer: Response, url: str) -> np.ndarray:
    """float32 [response_length]. SGLang gives (log-prob, token id, text) for each token from
    `logprob_start_len` on, of which the first has nothing before it.
    """
    if not answer.ok:
        raise RunError(f"the teacher refused a sample: {answer.complaint()}", where=f"{FLAG} {url}")
    triples = (answer.json().get("meta_info") or {}).get("input_token_logprobs") or []
    length = sample.response_length
    told = triples[len(triples) - length :] if len(triples) >= length else []
    ids = [int(token) for _, token, *_ in told]
    if ids != sample.tokens[sample.prompt_length :] or any(triple[0] is None for triple in told):
        raise RunError(
            f"the teacher gave {len(triples)} log-probs that are not those of the response",
            where=f"{FLAG} {url}",
            why=f"the response has {length} tokens, each of which needs one",
            fix="serve the teacher with SGLang",
        )
    return np.array([triple[0] for triple in told], dtype=np.float32)
