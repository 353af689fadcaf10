"""The result as a table for people."""

from __future__ import annotations

from typing import Any

from laptop.comparison import BAR, REWARD_SPAN, meets_bar


def markdown(result: dict[str, Any]) -> str:
    """The result as Markdown: what was measured on what, the medians, and the rewards of every run."""
    rows = result["figures"]
    lines = [
        _provenance(result),
        "",
        "| median of the seeds | miles | TRL | times better |",
        "|---|---:|---:|---:|",
    ]
    lines += [_row(row) for row in rows]
    verdict = "met" if meets_bar(rows) else "missed"
    lines += [
        "",
        f"Bar: a step and the time to the reward at least {BAR:g}x shorter in processor seconds: {verdict}.",
    ]
    lines += ["", f"Mean reward of every {REWARD_SPAN} steps:", "", "```"]
    for side, runs in result["runs"].items():
        lines += [f"{side:>5} seed {run['seed']}  {_curve(run)}" for run in runs]
    return "\n".join([*lines, "```"])


def _provenance(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    runs = [run for found in result["runs"].values() for run in found]
    loads = [run["load_before"] for run in runs]
    shares = [
        sum(s["whole"]["cpu"] for s in run["steps"]) / sum(s["whole"]["wall"] for s in run["steps"])
        for run in runs
    ]
    return (
        f"{result['date']}, {result['processor']}, {result['cores']} cores, Python {result['python']}; "
        f"{versions}. "
        f"{len(result['seeds'])} seeds, {result['steps']} steps, one thread, runs of the two sides in turn. "
        f"Load before the runs {min(loads):.1f} to {max(loads):.1f}; the runs had {min(shares):.0%} to "
        f"{max(shares):.0%} of a core."
    )


def _row(row: dict[str, Any]) -> str:
    name = f"{row['figure']} [{row['unit']}]" if row["unit"] else row["figure"]
    better = "" if row["times_better"] is None else f"{row['times_better']:.2f}x"
    return f"| {name} | {_number(row['miles'])} | {_number(row['trl'])} | {better} |"


def _number(value: float | None) -> str:
    if value is None:
        return "not reached"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _curve(run: dict[str, Any]) -> str:
    rewards = [step["reward"] for step in run["steps"]]
    spans = [rewards[i : i + REWARD_SPAN] for i in range(0, len(rewards), REWARD_SPAN)]
    return " ".join(f"{sum(span) / len(span):.2f}".lstrip("0") for span in spans)
