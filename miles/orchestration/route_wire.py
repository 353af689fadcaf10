"""Routes between processes: compact on the way, int16 in memory on both sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from miles.data.route_codec import compact, expand
from miles.data.sample import Sample
from miles.errors import MilesError

if TYPE_CHECKING:
    from miles.orchestration.engine_pool import Answer

Convert = Callable[[np.ndarray], np.ndarray]


def pack_samples(samples: Sequence[Sample]) -> list[Sample]:
    """Copies to send."""
    return [_with_routes(sample, compact) for sample in samples]


def unpack_samples(samples: Sequence[Sample]) -> list[Sample]:
    """What was received, as it was."""
    return [_with_routes(sample, expand) for sample in samples]


def pack_answer(answer: Answer) -> Answer:
    """An engine's answer to send."""
    return _converted(answer, compact)


def unpack_answer(answer: Answer) -> Answer:
    """What was received, as it was."""
    return _converted(answer, expand)


def _with_routes(sample: Sample, convert: Convert) -> Sample:
    routes = sample.rollout_routed_experts
    return sample if routes is None else replace(sample, rollout_routed_experts=convert(routes))


def _converted(answer: Answer, convert: Convert) -> Answer:
    if isinstance(answer, MilesError):
        return answer
    return [
        output
        if output.routed_experts is None
        else replace(output, routed_experts=convert(output.routed_experts))
        for output in answer
    ]
