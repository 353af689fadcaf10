"""No judgement at all: half of all responses are right. For rehearsals, in which no model can do anything."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

from miles.data.sample import Sample
from miles.rewards.outcome import Outcome


async def random_reward(samples: Sequence[Sample]) -> list[Outcome]:
    """1.0 or 0.0 by a checksum of prompt and response: the same response always has the same reward."""
    return [float(crc32(f"{sample.prompt}\n{sample.response}".encode()) & 1) for sample in samples]
