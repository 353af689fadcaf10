"""One cell of the table: a model and a workload, our engine beside transformers' best setting, in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from decoding import transformers_side
from decoding.miles_side import MilesSide
from decoding.models import Subject
from decoding.roofline import ceiling
from decoding.workload import Timing, Workload

TRIED_SHARE = 4
"""Settings are tried on this part of the response; the two best run whole."""


@dataclass(frozen=True)
class Cell:
    """Medians in new tokens per second of processor time and of wall time, prefill included."""

    workload: Workload
    miles: float
    miles_wall: float
    generate: float
    generate_wall: float
    setting: str
    continuous: float | None
    ceiling: float
    decode_kernel: str

    @property
    def times_generate(self) -> float:
        return self.miles / self.generate

    @property
    def times_continuous(self) -> float | None:
        return None if self.continuous is None else self.miles / self.continuous


def measure_cell(
    subject: Subject, workload: Workload, repeats: int, continuous: bool, kernel: str, named: Sequence[str]
) -> Cell:
    """All sides, turn by turn. `named`: the settings of generate to try; none: all."""
    side = MilesSide(subject, workload, kernel)
    MilesSide(subject, replace(workload, response=2), kernel).generate()
    settings = [s for s in transformers_side.settings(subject) if not named or str(s) in named]
    best = settings if len(settings) == 1 else _two_best(subject, workload, settings)
    ours: list[Timing] = []
    theirs: dict[transformers_side.Setting, list[Timing]] = {setting: [] for setting in best}
    batched: list[Timing] = []
    for _ in range(repeats):
        ours.append(side.generate())
        for setting in best:
            theirs[setting].append(transformers_side.generate(subject, workload, setting))
        if continuous:
            batched.append(transformers_side.continuous_batching(subject, workload))
    winner = min(best, key=lambda setting: _cpu(theirs[setting]))
    tokens = workload.new_tokens
    return Cell(
        workload=workload,
        miles=tokens / _cpu(ours),
        miles_wall=tokens / _wall(ours),
        generate=tokens / _cpu(theirs[winner]),
        generate_wall=tokens / _wall(theirs[winner]),
        setting=str(winner),
        continuous=tokens / _cpu(batched) if batched else None,
        ceiling=ceiling(subject, workload),
        decode_kernel=side.decode_kernel,
    )


def _two_best(
    subject: Subject, workload: Workload, settings: Sequence[transformers_side.Setting]
) -> list[transformers_side.Setting]:
    """The two settings of `generate` that take least processor time on a shorter response."""
    shorter = replace(workload, response=max(2, workload.response // TRIED_SHARE))
    taken = {}
    for setting in settings:
        transformers_side.generate(subject, replace(workload, response=2), setting)
        taken[setting] = transformers_side.generate(subject, shorter, setting).cpu
    return sorted(taken, key=lambda setting: taken[setting])[:2]


def _cpu(timings: list[Timing]) -> float:
    return median(timing.cpu for timing in timings)


def _wall(timings: list[Timing]) -> float:
    return median(timing.wall for timing in timings)
