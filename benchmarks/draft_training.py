"""Does a draft that is trained along keep up with the policy, and does a frozen one fall behind?

    python benchmarks/draft_training.py [--steps 200] [--write docs/benchmarks.md]

Runs of the profile `quickstart-mtp` through the command line: the draft trained at every step, and the same
draft left as the warm start made it. Acceptance is what the engine measured while it sampled the rollouts:
the length is tokens per verification (the guesses that stood, and one token of the policy). Compared are the
means of the first and last tenth of the steps. Exit code 1: the trained draft ends below its start, or the
frozen one does not fall.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from laptop.machine import cores, processor
from laptop.page import write_section

from miles.record import RunReader

LENGTH, REWARD = "rollout/spec_accept_length", "rollout/raw_reward"
DEPTHS = tuple(f"rollout/spec_accept_rate/depth_{depth}" for depth in (1, 2, 3))
WAYS = {"trained": "--enable-mtp-training", "frozen": "--no-enable-mtp-training"}
POINTS = 20
"""Of each printed curve."""


def run(way: str, steps: int, seed: int, scratch: Path) -> dict[str, Any]:
    """One run: its curves by metric, and the processor seconds of its process."""
    runs = scratch / f"{way}-{seed}"
    words = (
        *("--profile", "quickstart-mtp", WAYS[way], "--num-rollout", str(steps), "--rollout-seed", str(seed)),
        *("--skip-eval-before-train", "--eval-prompt-data", "sort", "builtin:sort/test@[0:8]"),
        *("--save-interval", str(steps)),
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "miles_cli", "train", *words],
        env=os.environ | {"MILES_RUNS_DIR": str(runs)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    (run_dir,) = runs.iterdir()
    history = RunReader(run_dir).history
    curves = {name: [value for _, value in history.series[name]] for name in (LENGTH, REWARD, *DEPTHS)}
    return {"way": way, "seed": seed, "curves": curves, "cpu": after.ru_utime - before.ru_utime}


def ends(curve: list[float]) -> tuple[float, float]:
    """Means of the first and of the last tenth."""
    tenth = max(1, len(curve) // 10)
    return fmean(curve[:tenth]), fmean(curve[-tenth:])


def met(results: list[dict[str, Any]]) -> bool:
    """The trained draft ends at or above its start in every run, and the frozen one below."""
    kept = {way: [ends(r["curves"][LENGTH]) for r in results if r["way"] == way] for way in WAYS}
    return all(last >= first for first, last in kept["trained"]) and all(
        last < first for first, last in kept["frozen"]
    )


def markdown(results: list[dict[str, Any]], steps: int) -> str:
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {processor()}, {cores()} cores; {steps} steps of `quickstart-mtp`, "
        "three guesses in a row, sampled at temperature 1. Means of the first and last tenth of the steps.",
        "",
        "| draft | seed | acceptance length | depth 1 | depth 2 | depth 3 | reward | processor [s] |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        cells = [" → ".join(f"{x:.2f}" for x in ends(result["curves"][n])) for n in (LENGTH, *DEPTHS, REWARD)]
        lines.append(f"| {result['way']} | {result['seed']} | {' | '.join(cells)} | {result['cpu']:.0f} |")
    verdict = "met" if met(results) else "missed"
    lines += [
        "",
        f"Bar: with online training the length ends at or above its start; frozen it falls: {verdict}.",
    ]
    lines += ["", f"Acceptance length, mean of every {max(1, steps // POINTS)} steps:", "", "```"]
    lines += [f"{r['way']:>7} seed {r['seed']}  {points(r['curves'][LENGTH])}" for r in results]
    return "\n".join([*lines, "```"])


def points(curve: list[float]) -> str:
    width = max(1, len(curve) // POINTS)
    return " ".join(f"{fmean(curve[i : i + width]):.2f}" for i in range(0, len(curve), width))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--json", action="store_true", help="print every curve as JSON")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        # The warm start is made once and kept: it belongs to neither side.
        run("frozen", 1, 0, Path(scratch) / "warm")
        results = [run(way, options.steps, seed, Path(scratch)) for seed in options.seeds for way in WAYS]
    text = markdown(results, options.steps)
    if options.write is not None:
        write_section(options.write, "draft_training", text)
    print(json.dumps(results) if options.json else text)
    sys.exit(0 if met(results) else 1)


if __name__ == "__main__":
    main()
