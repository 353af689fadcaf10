"""Questions to a server beside the run (a reward model, a teacher): asked again when it is down."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from miles.errors import Unavailable
from miles.http_client import ConnectionLost, HttpClient, Response

IN_FLIGHT = 64
"""Requests at a time."""
TIMEOUT_S = 120.0
ATTEMPTS = 6
FIRST_PAUSE_S = 0.5
"""Before the second attempt; it doubles with each, and up to half of it is added so that clients spread."""


class PatientClient:
    """One address of one server. `what` and `flag` name it in messages."""

    def __init__(self, url: str, what: str, flag: str, pause_s: float = FIRST_PAUSE_S) -> None:
        """Raises ConfigError when `url` is no address."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        self._client, self.url = HttpClient(f"{parts.scheme}://{parts.netloc}"), url
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._what, self._flag, self._pause_s = what, flag, pause_s

    async def ask_all(self, bodies: Iterable[Any]) -> list[Response]:
        """One POST for each, with an answer of any status below 500, in order. Raises Unavailable."""
        # Made here: a semaphore belongs to the loop that waits for it.
        free = asyncio.Semaphore(IN_FLIGHT)

        async def ask(body: Any) -> Response:
            async with free:
                return await self._ask(body)

        return list(await asyncio.gather(*(ask(body) for body in bodies)))

    async def _ask(self, body: Any) -> Response:
        trouble = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(self._pause_s * 2 ** (attempt - 1) * (1 + random.random() / 2))
            try:
                response = await self._client.post(self._path, body, TIMEOUT_S)
            except ConnectionLost as lost:
                trouble = lost.why or lost.what
                continue
            if response.status < 500:
                return response
            trouble = f"HTTP status {response.status}: {response.complaint()}"
        raise Unavailable(
            f"{self._what} gave no answer in {ATTEMPTS} attempts",
            where=f"{self._flag} {self.url}",
            why=trouble,
            fix=f"start it, or look at its log; try it: curl -X POST {self.url}",
        )
