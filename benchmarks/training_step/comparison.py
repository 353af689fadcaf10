"""From the runs of both sides to one row: the best layout of each, and how many times better miles is."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

BARS = {"short-prompts": 2.0, "long-prompts": 2.0, "uneven-responses": 1.3}
"""Tokens per processor second of miles against the best Hugging Face layout, by workload."""

LOSS_TOLERANCE = 1e-4
COMPARED_STEPS = 2
"""Losses of so many first steps must agree; later Adam amplifies what the order of sums changed."""


@dataclass(frozen=True)
class Side:
    """The best layout of one side. Rates are rows per second, memory is in MB."""

    layout: str
    cpu_rate: float
    wall_rate: float
    peak_mb: float
    growth_mb: float


def contenders(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The layouts that may still turn out the best of their side: the others are not run again."""
    seconds = {layout: min(run["cpu"][0] for run in rounds) for layout, rounds in runs.items()}
    return [layout for layout, took in seconds.items() if took < 1.3 * min(seconds.values())]


def best(runs: dict[str, list[dict[str, Any]]], rows: int) -> Side:
    """The layout of most rows per processor second, by its median step over all rounds."""
    sides = []
    for layout, rounds in runs.items():
        cpu = median(seconds for run in rounds for seconds in run["cpu"])
        wall = median(seconds for run in rounds for seconds in run["wall"])
        peak, growth = (median(run[name] for run in rounds) for name in ("peak_mb", "growth_mb"))
        sides.append(Side(layout, rows / cpu, rows / wall, peak, growth))
    return max(sides, key=lambda side: side.cpu_rate)


def check_losses(runs: dict[str, dict[str, list[dict[str, Any]]]]) -> float:
    """The largest difference of a loss from miles' first run; AssertionError beyond the tolerance."""
    reference = next(iter(runs["miles"].values()))[0]["losses"][:COMPARED_STEPS]
    largest = 0.0
    for side, layouts in runs.items():
        for layout, rounds in layouts.items():
            for run in rounds:
                losses = run["losses"][:COMPARED_STEPS]
                gap = max(abs(a - b) for a, b in zip(reference, losses, strict=True))
                assert gap <= LOSS_TOLERANCE, f"{side} {layout}: losses {losses}, miles {reference}"
                largest = max(largest, gap)
    return largest


def compare(
    model: str, workload: str, rows: int, runs: dict[str, dict[str, list[dict[str, Any]]]]
) -> dict[str, Any]:
    """One row of the table. `runs`: side -> layout -> rounds."""
    gap = check_losses(runs)
    miles, hf = best(runs["miles"], rows), best(runs["hf"], rows)
    times_better = miles.cpu_rate / hf.cpu_rate
    return {
        "model": model,
        "workload": workload,
        "rows": rows,
        "miles": miles,
        "hf": hf,
        "times_better": times_better,
        "wall_times_better": miles.wall_rate / hf.wall_rate,
        "loss_gap": gap,
        "bar": BARS[workload],
        "met": times_better >= BARS[workload] and miles.peak_mb < hf.peak_mb,
    }


def markdown(result: dict[str, Any]) -> str:
    """The rows as a table, with what they were measured on."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"{result['date']}, {result['processor']}, {result['cores']} cores; {versions}. One thread, fp32, "
        f"medians of {result['rounds']} rounds of {result['steps']} steps, sides in turn. "
        f"Load {min(result['load']):.1f} to {max(result['load']):.1f}.",
        "",
        "| model, workload | rows | miles [tokens/s] | Hugging Face [tokens/s] | times better (wall) | bar | "
        "peak [MB] | growth [MB] | losses differ |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [_line(row) for row in result["rows"]]
    missed = [f"{row['model']} {row['workload']}" for row in result["rows"] if not row["met"]]
    verdict = "met" if not missed else "missed by " + ", ".join(missed)
    return "\n".join([*lines, "", f"Bar, and less memory than Hugging Face at its peak: {verdict}."])


def _line(row: dict[str, Any]) -> str:
    miles, hf = row["miles"], row["hf"]
    return (
        f"| {row['model']}, {row['workload']} | {row['rows']:,} | {miles.cpu_rate:,.0f} | "
        f"{hf.cpu_rate:,.0f} ({hf.layout}) | {row['times_better']:.2f}x ({row['wall_times_better']:.2f}x) | "
        f"{row['bar']:g}x | {miles.peak_mb:,.0f} to {hf.peak_mb:,.0f} | "
        f"{miles.growth_mb:,.0f} to {hf.growth_mb:,.0f} | {row['loss_gap']:.0e} |"
    )
