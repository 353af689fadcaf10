"""Exact match: the response is the label and ended by itself."""

from __future__ import annotations

from collections.abc import Sequence

from miles.data.sample import Sample, SampleStatus
from miles.rewards.outcome import Outcome


async def exact(samples: Sequence[Sample]) -> list[Outcome]:
    """1.0 when the response text equals the label, character by character, and the sample is COMPLETED.

    Else 0.0. A truncated response does not count: it might have gone on. The stop token is not part of the
    response text.
    """
    return [float(s.status is SampleStatus.COMPLETED and s.response == s.label) for s in samples]
