"""From points under other names to a History under ours."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from miles.diagnosis.foreign.names import System, is_known, recognise
from miles.diagnosis.foreign.tfevents import Scalar
from miles.record import History
from miles.record import events as kinds


@dataclass(frozen=True)
class ForeignMetrics:
    """What was understood. `unknown` are names that no rule can read."""

    history: History
    system: str
    known: tuple[str, ...]
    unknown: tuple[str, ...]


def understand(points: Iterable[Scalar]) -> ForeignMetrics:
    """Recognise the system and take over every metric that we know.

    Where a tag goes back to an earlier step, the run was restarted from there: later points said before that
    are void, as TensorBoard has it.
    """
    by_tag: dict[str, list[Scalar]] = defaultdict(list)
    for point in points:
        by_tag[point.tag].append(point)
    system = recognise(by_tag)
    history = History()
    rows: dict[int, dict[str, float]] = defaultdict(dict)
    times: dict[int, float] = {}
    known, unknown = [], []
    for tag, said in sorted(by_tag.items()):
        ours = _ours(system, tag)
        live = _without_abandoned(sorted(said, key=lambda p: p.time))
        if ours is None or (system and ours[0] in system.zero_is_absent and not any(p.value for p in live)):
            unknown.append(tag)
            continue
        known.append(tag)
        for point in live:
            rows[point.step].setdefault(ours[0], ours[1](point.value) if ours[1] else point.value)
            times[point.step] = point.time
    for number, step in enumerate(sorted(rows)):
        history.ingest(
            {
                "kind": kinds.METRICS,
                "writer": "foreign",
                "attempt": 1,
                "seq": number,
                "time": times[step],
                "step": step,
                "metrics": rows[step],
            }
        )
    title = system.title if system else "unknown system"
    return ForeignMetrics(history, title, tuple(known), tuple(unknown))


def _ours(system: System | None, tag: str) -> tuple[str, Callable[[float], float] | None] | None:
    if system is not None:
        return system.ours(tag)
    return (tag, None) if is_known(tag) else None


def _without_abandoned(points: list[Scalar]) -> list[Scalar]:
    live: list[Scalar] = []
    for point in points:
        while live and live[-1].step >= point.step:
            live.pop()
        live.append(point)
    return live
