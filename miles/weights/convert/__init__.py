"""From one checkpoint to another: a plan that is checked before anything is written, then group by group.

>>> plan = plan_conversion(open_source(Path("Qwen3-30B-A3B")), Path("out"), Wanted(NumberFormat("fp8")))
>>> convert(plan)
"""

from __future__ import annotations

from miles.weights.convert.logits import check_of_logits
from miles.weights.convert.plan import Conversion, partial_directory, plan_conversion
from miles.weights.convert.run import Progress, convert
from miles.weights.convert.source import Source, open_source
from miles.weights.convert.wanted import Wanted

__all__ = [
    "Conversion",
    "Progress",
    "Source",
    "Wanted",
    "check_of_logits",
    "convert",
    "open_source",
    "partial_directory",
    "plan_conversion",
]
