"""The last words of a run: its curve, what it changed on held-out prompts, what to type next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from miles.record import RunReader, events
from miles_cli.units import count, duration

if TYPE_CHECKING:
    from miles.record import Summary

REWARD = "rollout/raw_reward"
CURVE_WIDTH = 80
CURVE_HEIGHT = 8


def summary_lines(run_dir: Path, summary: Summary) -> Iterator[str]:
    """The end of a run in text. Values that were never measured are left out."""
    yield f"{summary.status}: {count(summary.steps, 'step')} in {duration(summary.seconds)}"
    yield from _curve(run_dir, summary)
    yield from _accuracies(summary)
    if any(summary.alerts.values()):
        raised = ", ".join(f"{number} {severity}" for severity, number in summary.alerts.items() if number)
        yield f"alerts: {raised}"
    yield f"run: {run_dir}"
    yield "next:"
    for command, purpose in _next_commands(run_dir, summary):
        yield f"  {command}  # {purpose}"


def _curve(run_dir: Path, summary: Summary) -> Iterator[str]:
    """The reward of the whole run, earlier attempts included, as its record has it."""
    first, last = summary.reward_first5, summary.reward_last5
    if first is None or last is None:
        return

    from miles_cli.dashboard.chart import Chart, Curve, draw_chart
    from miles_cli.dashboard.symbols import choose_symbols
    from miles_cli.render.run_frame import load_snapshot

    run = load_snapshot(run_dir)
    if run.last_step > 5:
        yield f"reward: {first:.3f} in the first five steps, {last:.3f} in the last five"
    else:
        yield f"reward: {last:.3f} on average"
    chart = Chart((Curve(run.tracks[REWARD]),), 0, run.last_step)
    for line in draw_chart(chart, CURVE_WIDTH, CURVE_HEIGHT, choose_symbols()).lines():
        yield "".join(text for text, _ in line).rstrip()


def _accuracies(summary: Summary) -> Iterator[str]:
    for name, after in summary.eval_after.items():
        before = summary.eval_before.get(name, {})
        yield f"held out, {name}: {'; '.join(_change(kind, before, after) for kind in after)}"
        yield from _what_moved(before, after)


def _change(kind: str, before: Mapping[str, float], after: Mapping[str, float]) -> str:
    return (
        f"{kind} {before[kind]:.3f} -> {after[kind]:.3f}" if kind in before else f"{kind} {after[kind]:.3f}"
    )


def _what_moved(before: Mapping[str, float], after: Mapping[str, float]) -> Iterator[str]:
    """Say so when greedy decoding was good before: then RL taught the policy to sample what it knew."""
    if not {"sampled", "greedy"} <= before.keys() & after.keys():
        return
    if after["sampled"] - before["sampled"] > 2 * abs(after["greedy"] - before["greedy"]):
        yield (
            f"  what moved is the sampled policy: greedy answers were right {before['greedy']:.0%} of "
            "the time before training"
        )


def _next_commands(run_dir: Path, summary: Summary) -> Iterator[tuple[str, str]]:
    if summary.status != "finished":
        yield f"miles diagnose {run_dir}", "why it ended"
        yield f"miles runs resume {run_dir}", _what_resuming_does(run_dir)
    elif any(summary.alerts.values()):
        yield f"miles diagnose {run_dir}", "what the alerts mean, and what to change"
        yield f"miles watch {run_dir} --once", "curves, phases and alerts"
    else:
        yield f"miles watch {run_dir} --once", "curves, phases and alerts"
        yield f"miles diagnose {run_dir}", "is anything wrong, and what to change"
    yield f"miles runs show {run_dir}", "everything the run was told, and its checkpoints"


def _what_resuming_does(run_dir: Path) -> str:
    saved = [event["step"] for event in RunReader(run_dir).events(events.CHECKPOINT)]
    return f"go on after step {max(saved)}" if saved else "start again: there is no checkpoint yet"
