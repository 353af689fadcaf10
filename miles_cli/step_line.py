"""One training step as one line: what it earned, whether numerics are sound, where time went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles_cli.units import duration, rate

PHASES = (
    ("rollout", "perf/rollout_time"),
    ("log-probs", "perf/log_probs_time"),
    ("train", "perf/train_time"),
    ("sync", "perf/update_weights_time"),
)
SHOWN_PHASE_PERCENT = 1
"""Phases below this share of the step are left out of the line."""


def step_line(row: Mapping[str, Any], width: int | None = None) -> str:
    """The line of one step; metrics that were not measured are absent from it.

    `width` drops parts from the end until the line fits a terminal; None keeps all of them.
    """
    parts = _parts(row)
    while width is not None and len(parts) > 1 and len("  ".join(parts)) > width:
        parts.pop()
    return "  ".join(parts)


def _parts(row: Mapping[str, Any]) -> list[str]:
    """The parts, most important first."""
    metrics: Mapping[str, float] = row["metrics"]
    digits = len(str(row["total"]))
    parts = [f"step {row['step']:>{digits}}/{row['total']}"]
    if metrics.get("train/step_skipped"):
        parts.append("SKIPPED: non-finite")
    for label, name, form in (
        ("reward", "rollout/raw_reward", ".3f"),
        ("gap", "train/train_rollout_logprob_abs_diff", ".1e"),
        ("entropy", "train/entropy", ".3f"),
        ("grad", "train/grad_norm", ".2f"),
    ):
        if name in metrics:
            parts.append(f"{label} {metrics[name]:{form}}")
    if "perf/tokens_per_sec" in metrics:
        parts.append(f"{rate(metrics['perf/tokens_per_sec'])} tok/s")
    if "perf/step_time" in metrics:
        parts.append(duration(metrics["perf/step_time"]))
    return parts + _phase_parts(metrics)


def _phase_parts(metrics: Mapping[str, float]) -> list[str]:
    whole = metrics.get("perf/step_time")
    if not whole:
        return []
    shares = [(label, 100 * metrics[name] / whole) for label, name in PHASES if name in metrics]
    return [f"{label} {share:.0f}%" for label, share in shares if share >= SHOWN_PHASE_PERCENT]
