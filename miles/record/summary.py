"""summary.json: how a run ended, in one small file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from miles._version import __version__
from miles.record import events as kinds
from miles.record.history import History, Series
from miles.record.json_file import read_json, write_json
from miles.record.layout import RunLayout
from miles.record.status import RunStatus

REWARD = "rollout/raw_reward"
REWARD_SPAN = 5
_SEVERITIES = ("critical", "warning", "info")


@dataclass(frozen=True)
class Summary:
    """What is left to say when a run has ended. A value that was never measured is None or absent."""

    status: str
    """A RunStatus that is an ending: finished, failed, stopped or interrupted."""
    attempt: int
    steps: int
    """Optimizer steps finished, all attempts together."""
    seconds: float
    """Wall time of this attempt."""
    reward_first5: float | None
    """Mean raw reward of the first five steps."""
    reward_last5: float | None
    eval_before: dict[str, dict[str, float]]
    """Held-out accuracy before training, where measured: {"sort": {"sampled": 0.36, "greedy": 0.95}}."""
    eval_after: dict[str, dict[str, float]]
    metrics: dict[str, float]
    """The last value of every metric."""
    alerts: dict[str, int]
    """Alerts raised, by severity."""
    config_hash: str
    code_version: str = __version__
    run: dict[str, Any] = field(default_factory=dict)
    """Identity: id, name, seed, whatever meta.json says that a table of runs wants."""


def summarise(
    history: History,
    status: RunStatus,
    seconds: float,
    config_hash: str,
    code_version: str = __version__,
    run: dict[str, Any] | None = None,
) -> Summary:
    """Build the summary from the live history."""
    rewards = list(history.series.get(REWARD, Series()).values)
    raised = [e["severity"] for e in history.of_kind(kinds.ALERT) if e["state"] == "raised"]
    return Summary(
        status=status.value,
        attempt=history.attempt,
        steps=history.last_step or 0,
        seconds=seconds,
        reward_first5=_mean(rewards[:REWARD_SPAN]),
        reward_last5=_mean(rewards[-REWARD_SPAN:]),
        eval_before=_accuracies(history, lambda steps: steps[0] == 0, 0),
        eval_after=_accuracies(history, lambda steps: steps[-1] > 0, -1),
        metrics={name: series.last for name, series in sorted(history.series.items())},
        alerts={severity: raised.count(severity) for severity in _SEVERITIES},
        config_hash=config_hash,
        code_version=code_version,
        run=run or {},
    )


def write_summary(run_dir: str | Path, summary: Summary) -> None:
    """Write summary.json atomically. Raises OSError."""
    write_json(RunLayout(run_dir).summary, asdict(summary))


def read_summary(run_dir: str | Path) -> Summary | None:
    """The summary of a run, None while there is none."""
    path = RunLayout(run_dir).summary
    return Summary(**read_json(path)) if path.exists() else None


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _accuracies(
    history: History, measured: Callable[[Sequence[int]], bool], position: int
) -> dict[str, dict[str, float]]:
    """Sampled and greedy accuracy by set at the first (0) or last (-1) evaluation, where `measured`."""
    found: dict[str, dict[str, float]] = {}
    for name, series in sorted(history.series.items()):
        if not name.startswith("eval/") or name.endswith("-truncated_ratio"):
            continue
        if not measured(series.steps):
            continue
        dataset, greedy = name.removeprefix("eval/"), name.endswith("-greedy")
        key = "greedy" if greedy else "sampled"
        found.setdefault(dataset.removesuffix("-greedy"), {})[key] = series.values[position]
    return found
