"""From two lists of steps to ratios: each figure is the median over seeds of a figure of one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

TARGET_REWARD = 0.80
REWARD_SPAN = 5
"""The target is met by the mean reward of this many steps in a row."""
BAR = 4.0
"""How many times shorter a step and the time to the target must be."""
WARM_STEPS = 3
"""First steps left out of the per-step figures: allocators and caches fill up."""


@dataclass(frozen=True)
class Figure:
    """One row of the table. `higher` says which direction is better."""

    name: str
    unit: str
    of: Callable[[dict[str, Any]], float | None]
    higher: bool = False


def _steps(run: dict[str, Any]) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = run["steps"]
    return steps[WARM_STEPS:]


def step_seconds(run: dict[str, Any], clock: str) -> float:
    """Mean over the run: every step counts, the long ones too."""
    return fmean(step["whole"][clock] for step in _steps(run))


def rollout_rate(run: dict[str, Any], clock: str) -> float:
    """Response tokens per second of rollout."""
    tokens = sum(step["response_tokens"] for step in _steps(run))
    return tokens / sum(step["rollout"][clock] for step in _steps(run))


def train_rate(run: dict[str, Any], clock: str) -> float:
    """Tokens of prompts and responses per second of everything that is not rollout."""
    tokens = sum(step["response_tokens"] for step in _steps(run)) + len(_steps(run)) * run["prompt_tokens"]
    return tokens / sum(step["whole"][clock] - step["rollout"][clock] for step in _steps(run))


def steps_to_target(run: dict[str, Any]) -> int | None:
    """Steps done when the mean reward of the last five first reached the target; None if it never did."""
    rewards = [step["reward"] for step in run["steps"]]
    for end in range(REWARD_SPAN, len(rewards) + 1):
        if fmean(rewards[end - REWARD_SPAN : end]) >= TARGET_REWARD:
            return end
    return None


def time_to_target(run: dict[str, Any], clock: str) -> float | None:
    """Seconds from the start of the first step until the target was met. Start-up is not in it."""
    count = steps_to_target(run)
    return None if count is None else sum(step["whole"][clock] for step in run["steps"][:count])


def _figures(clock: str, seconds: str) -> list[Figure]:
    return [
        Figure(f"step, {seconds}", "ms", lambda run: 1000 * step_seconds(run, clock)),
        Figure(f"time to reward {TARGET_REWARD:.2f}, {seconds}", "s", lambda run: time_to_target(run, clock)),
        Figure(f"rollout, {seconds}", "tokens/s", lambda run: rollout_rate(run, clock), higher=True),
        Figure(f"train, {seconds}", "tokens/s", lambda run: train_rate(run, clock), higher=True),
    ]


FIGURES: tuple[Figure, ...] = (
    *_figures("cpu", "processor"),
    *_figures("wall", "wall"),
    Figure(f"steps to reward {TARGET_REWARD:.2f}", "", steps_to_target),
    Figure("peak memory", "MB", lambda run: run["peak_rss_mb"]),
    Figure("start-up, wall", "s", lambda run: run["startup"]["wall"]),
    Figure("start-up, processor", "s", lambda run: run["startup"]["cpu"]),
)
BARRED = ("step, processor", f"time to reward {TARGET_REWARD:.2f}, processor")


def compare(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per figure: medians of both sides and how many times better miles is.

    A figure that a run does not have (the target was never met) makes the side's median None.
    """
    rows = []
    for figure in FIGURES:
        sides = {side: _median([figure.of(run) for run in found]) for side, found in runs.items()}
        rows.append(
            {"figure": figure.name, "unit": figure.unit, **sides, "times_better": _ratio(figure, sides)}
        )
    return rows


def meets_bar(rows: list[dict[str, Any]]) -> bool:
    """Whether a step and the way to the target are both `BAR` times shorter, in processor seconds."""
    ratios = [row["times_better"] for row in rows if row["figure"] in BARRED]
    return all(ratio is not None and ratio >= BAR for ratio in ratios)


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if len(known) == len(values) else None


def _ratio(figure: Figure, sides: dict[str, float | None]) -> float | None:
    miles, trl = sides["miles"], sides["trl"]
    if miles is None or trl is None:
        return None
    return miles / trl if figure.higher else trl / miles
