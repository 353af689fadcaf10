"""Every metric, declared once: what it means, its unit, its healthy range, and what moves it.

The writer refuses a name that is not here, `docs/reference/metrics.md` is generated from here, and the
terminal and the rules read the ranges. A metric that cannot be computed is absent, never zero.
`<i>` in a name stands for a number, any other `<word>` for a text without a slash.
"""

from __future__ import annotations

import functools
import re

from miles.record.metrics.critic import CRITIC
from miles.record.metrics.evaluation import EVALUATION
from miles.record.metrics.metric import Band, Metric
from miles.record.metrics.mismatch import MISMATCH
from miles.record.metrics.performance import PERFORMANCE
from miles.record.metrics.policy import POLICY
from miles.record.metrics.precision import PRECISION
from miles.record.metrics.rollout import ROLLOUT
from miles.record.metrics.routing import ROUTING

__all__ = ["METRICS", "Band", "Metric", "find_metric"]

METRICS: tuple[Metric, ...] = (
    *POLICY,
    *CRITIC,
    *MISMATCH,
    *ROUTING,
    *PRECISION,
    *ROLLOUT,
    *PERFORMANCE,
    *EVALUATION,
)

_EXACT = {m.name: m for m in METRICS if "<" not in m.name}


def _pattern(name: str) -> re.Pattern[str]:
    escaped = re.escape(name).replace("<i>", r"\d+")
    return re.compile(re.sub(r"<\w+>", "[^/]+", escaped) + r"\Z")


# Longest first: "eval/<name>-greedy" must win over "eval/<name>".
_PATTERNS = sorted(
    ((_pattern(m.name), m) for m in METRICS if "<" in m.name), key=lambda pair: -len(pair[1].name)
)


@functools.lru_cache(maxsize=4096)
def find_metric(name: str) -> Metric | None:
    """The declaration of `name`, None when there is none."""
    if name in _EXACT:
        return _EXACT[name]
    return next((metric for pattern, metric in _PATTERNS if pattern.match(name)), None)
