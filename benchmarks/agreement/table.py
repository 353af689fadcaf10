"""Figures as tables for people, and the bars they are judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from agreement.measure import WAYS

LEAST_FALL = 3.0
"""How many times smaller the mean gap of flipped tokens must be with replay, with a bf16 engine."""
MOST_GROWTH = 1.02
"""How much larger than without replay maximum gap and KL may be."""

ROWS = (
    ("gap, mean [nats]", "abs_diff", "{:.2e}"),
    ("gap, 99th percentile [nats]", "abs_diff_p99", "{:.2e}"),
    ("gap, maximum [nats]", "abs_diff_max", "{:.2e}"),
    ("k3 KL [nats]", "kl", "{:.2e}"),
    ("tokens with ratio above 2", "ratio_above_2", "{:.2%}"),
    ("expert choices that differ, at dispatch", "flips", "{:.3%}"),
    ("tokens with such a choice in some layer", "tokens_flipped", "{:.2%}"),
    ("gap of tokens that would flip, mean [nats]", "abs_diff_flipped", "{:.2e}"),
    ("importance weights cut", "cut", "{:.2%}"),
    ("sampling and a training step [tokens per processor second]", "tokens_per_second", "{:,.0f}"),
)

Cell = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """One promise about a cell. `value` is what was found."""

    text: str
    value: str
    met: bool


def medians(runs: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Median over the seeds of every figure of every way; of flips that must be 0, the largest value."""
    found: dict[str, dict[str, float]] = {}
    for way in WAYS:
        names = {name for run in runs for name in run[way.name]}
        of_way = {name: [run[way.name][name] for run in runs if name in run[way.name]] for name in names}
        found[way.name] = {name: median(values) for name, values in of_way.items()}
        if way.replay or way.exact:
            found[way.name] |= {name: max(of_way[name]) for name in ("flips", "tokens_flipped")}
    return found


def bars(cell: Cell) -> list[Bar]:
    """The promises of replay, for one model and format."""
    plain, replayed, exact = (cell["figures"][name] for name in ("plain", "R3", "true on-policy"))
    grown = {name: replayed[name] / plain[name] for name in ("abs_diff_max", "kl")}
    found = [
        Bar("flips with R3, every seed: 0", f"{replayed['flips']:g}", replayed["flips"] == 0),
        Bar("true on-policy gap: 0", f"{exact['abs_diff_max']:g}", exact["abs_diff_max"] == 0),
        *(
            Bar(f"{told} with R3 at most {MOST_GROWTH}x", f"{grown[name]:.2f}x", grown[name] <= MOST_GROWTH)
            for name, told in (("abs_diff_max", "maximum gap"), ("kl", "k3 KL"))
        ),
    ]
    if cell["format"] == "bf16":
        fall = plain["abs_diff_flipped"] / replayed["abs_diff_flipped"]
        told = f"gap of tokens that would flip: at least {LEAST_FALL:g}x smaller"
        found.append(Bar(told, f"{fall:.1f}x", fall >= LEAST_FALL))
    return found


def markdown(result: dict[str, Any]) -> str:
    """One table per model and format, with its bars."""
    lines = [
        f"{result['date']}, {result['processor']}, {result['cores']} cores, torch {result['torch']}; "
        f"{len(result['seeds'])} seeds of {result['samples']} samples, one thread. Load before "
        f"{result['load_before']:.1f}.",
    ]
    for cell in result["cells"]:
        lines += ["", f"**{cell['model']}, engine {cell['format']}, trainer fp32**", "", *_table(cell), ""]
        lines += [f"- {bar.text}: {bar.value}, {'met' if bar.met else 'missed'}" for bar in bars(cell)]
    return "\n".join(lines)


def _table(cell: Cell) -> list[str]:
    names = [way.name for way in WAYS]
    lines = [f"| median of the seeds | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for told, figure, form in ROWS:
        values = (cell["figures"][name].get(figure) for name in names)
        lines.append(f"| {told} | {' | '.join('' if v is None else form.format(v) for v in values)} |")
    return lines
