"""A reward server: one POST per response, a number or a table back (`--rm-type remote_rm --rm-url URL`).

The request is upstream's: `{"prompt", "response", "label"}`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from urllib.parse import urlsplit

import orjson

from miles.data.sample import Sample
from miles.errors import Unavailable
from miles.http_client import ConnectionLost, HttpClient, Response
from miles.rewards.outcome import Outcome, RewardFailure

IN_FLIGHT = 64
"""Requests at a time."""
TIMEOUT_S = 120.0
ATTEMPTS = 6
FIRST_PAUSE_S = 0.5
"""Before the second attempt; it doubles with each, and up to half of it is added so that clients spread."""


class RemoteReward:
    """Asks a server for every reward.

    What the server refuses (a status 4xx, an answer that is no reward) is a failure of that sample. A server
    that cannot be reached or breaks down (5xx) is asked again, and ends the run when it stays so.
    """

    def __init__(self, url: str, pause_s: float = FIRST_PAUSE_S, timeout_s: float = TIMEOUT_S) -> None:
        """Raises ConfigError when `url` is no address."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        self._client, self._url = HttpClient(f"{parts.scheme}://{parts.netloc}"), url
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._pause_s, self._timeout_s = pause_s, timeout_s

    async def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        # Made here: a semaphore belongs to the loop that waits for it.
        free = asyncio.Semaphore(IN_FLIGHT)

        async def judge(sample: Sample) -> Outcome:
            async with free:
                return self._read(await self._ask(sample))

        return list(await asyncio.gather(*(judge(sample) for sample in samples)))

    async def _ask(self, sample: Sample) -> Response:
        """The server's answer, other than that it broke down. Raises Unavailable."""
        question = {"prompt": sample.prompt, "response": sample.response, "label": sample.label}
        trouble = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(self._pause_s * 2 ** (attempt - 1) * (1 + random.random() / 2))
            try:
                response = await self._client.post(self._path, question, self._timeout_s)
            except ConnectionLost as lost:
                trouble = lost.why or lost.what
                continue
            if response.status < 500:
                return response
            trouble = f"HTTP status {response.status}: {response.complaint()}"
        raise Unavailable(
            f"the reward server gave no answer in {ATTEMPTS} attempts",
            where=f"--rm-url {self._url}",
            why=trouble,
            fix=f"start it, or look at its log; try it: curl -X POST {self._url}",
        )

    def _read(self, response: Response) -> Outcome:
        if not response.ok:
            return RewardFailure("exception", f"{self._url}: {response.status} {response.complaint()}")
        try:
            answer = response.json()
        except orjson.JSONDecodeError:
            answer = None
        if isinstance(answer, int | float | dict):
            return answer
        return RewardFailure(
            "exception", f"{self._url} answered {response.body[:80]!r}, not a reward in JSON"
        )
