"""How long the responses to each prompt were, so that those that take longest are begun first.

A batch that ends with a few long responses decodes them almost alone. Begun first, they run beside the
others: longest processing time first, Graham, "Bounds on Multiprocessing Timing Anomalies" (1969). The only
guess at a length is what the same prompt gave when it was last sampled; a prompt never seen before counts as
the mean of all.
"""

from __future__ import annotations

import statistics
import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from miles.data.sample import Sample

Group = list[Sample]


class LengthBook:
    """Mean response length of each prompt, in tokens, under a checksum of the prompt's ids."""

    def __init__(self) -> None:
        self._lengths: dict[str, float] = {}

    def longest_first(self, groups: Sequence[Group]) -> list[Group]:
        """The groups by falling expected length; equals, and all while nothing is known, as they come."""
        if not self._lengths:
            return list(groups)
        usual = statistics.fmean(self._lengths.values())
        return sorted(groups, key=lambda group: -self._lengths.get(_key(group), usual))

    def observe(self, groups: Iterable[Group]) -> None:
        """Remember how long these responses came out."""
        for group in groups:
            self._lengths[_key(group)] = statistics.fmean(sample.response_length for sample in group)

    def state(self) -> dict[str, float]:
        """Everything known, as JSON-able values."""
        return dict(self._lengths)

    def load_state(self, state: Mapping[str, float]) -> None:
        """Know what `state` knew, and nothing else."""
        self._lengths = dict(state)


def _key(group: Group) -> str:
    """Two prompts with one checksum are only begun in a poorer order."""
    first = group[0]
    return f"{zlib.crc32(np.array(first.tokens[: first.prompt_length], dtype=np.int64).tobytes()):08x}"
