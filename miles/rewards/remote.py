"""A reward server: one POST per response, a number or a table back (`--rm-type remote_rm --rm-url URL`).

The request is upstream's: `{"prompt", "response", "label"}`.
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from miles.data.sample import Sample
from miles.http_client import Response
from miles.patient_client import FIRST_PAUSE_S, PatientClient
from miles.rewards.outcome import Outcome, RewardFailure


class RemoteReward:
    """Asks a server for every reward.

    What the server refuses (a status 4xx, an answer that is no reward) is a failure of that sample. A server
    that cannot be reached or breaks down (5xx) is asked again, and ends the run when it stays so.
    """

    def __init__(self, url: str, pause_s: float = FIRST_PAUSE_S) -> None:
        """Raises ConfigError when `url` is no address."""
        self._server = PatientClient(url, "the reward server", "--rm-url", pause_s)

    async def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        questions = ({"prompt": s.prompt, "response": s.response, "label": s.label} for s in samples)
        return [self._read(answer) for answer in await self._server.ask_all(questions)]

    def _read(self, response: Response) -> Outcome:
        url = self._server.url
        if not response.ok:
            return RewardFailure("exception", f"{url}: {response.status} {response.complaint()}")
        try:
            answer = response.json()
        except orjson.JSONDecodeError:
            answer = None
        if isinstance(answer, int | float | dict):
            return answer
        return RewardFailure("exception", f"{url} answered {response.body[:80]!r}, not a reward in JSON")
