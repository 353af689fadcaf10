"""Metrics that other systems print: for people who kept nothing but the output of their run.

verl prints one line per step, `step:12 - actor/pg_loss:0.018 - actor/lr:1e-06 - …` (numbers may be wrapped in
`np.float64(…)`); miles and slime print a dictionary behind `step 12: ` or `rollout 12: `.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from miles.diagnosis.foreign.tfevents import Scalar
from miles.diagnosis.logs import Line

_NUMBER = r"[+-]?(?:\d+\.?\d*(?:e[+-]?\d+)?|\.\d+|nan|inf)"
_VERL_STEP = re.compile(r"\bstep:(\d+) - ")
_VERL = re.compile(rf"([\w.@-]+(?:/[\w.@-]+)+):(?:np\.\w+\()?({_NUMBER})\)?(?= - |\s*$)", re.IGNORECASE)
_MILES_STEP = re.compile(r"\b(?:step|rollout|perf|eval) (\d+): \{")
_MILES = re.compile(
    rf"['\"]([\w@-]+(?:/[\w@.-]+)+)['\"]: (?:np\.\w+\(|tensor\()?({_NUMBER})\)?(?=[,}}])", re.IGNORECASE
)


STEP_LINES = (_VERL_STEP, _MILES_STEP)
"""Lines that carry the metrics of a step."""


def printed_metrics(lines: list[Line]) -> Iterator[Scalar]:
    """Metrics of the lines, in their order."""
    for line in lines:
        if (match := _VERL_STEP.search(line.text)) is not None:
            pairs = _VERL.findall(line.text, match.end())
        elif (match := _MILES_STEP.search(line.text)) is not None:
            pairs = _MILES.findall(line.text, match.end())
        else:
            continue
        for name, value in pairs:
            yield Scalar(line.time, int(match[1]), name, float(value))
