"""One GRPO training step against the Hugging Face model in a plain torch loop: same weights, samples, loss.

    python benchmarks/trainer.py                                          # all parts
    python benchmarks/trainer.py --models moe --workloads long-prompts    # one of them

A part is a model and a workload: groups of 8 with short or with long prompts, and long responses of uneven
length. Every layout of a side (see `training_step`) runs in a process of its own, sides take turns, and the
best layout of each is compared: tokens per processor second, and the most memory the process held. The losses
of both sides must agree to 1e-4. `--write docs/benchmarks.md` puts the table into that page. Exit code 1: a
bar is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from laptop.machine import cores, load, processor
from laptop.page import write_section
from training_step.comparison import compare, contenders, markdown
from training_step.workloads import MODELS, WORKLOADS, rows_of

HERE = Path(__file__).parent
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}",
}
LAYOUTS = {"miles": ("whole", "budget"), "hf": ("padded", "sorted", "packed")}


def python(module: str, *words: str) -> str:
    """What a module of `training_step` prints, run in a process of its own."""
    command = [sys.executable, "-m", f"training_step.{module}", *words]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, cwd=HERE, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def run_part(model: str, workload: str, steps: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """Measure one part: layouts of both sides, in turn, `rounds` times."""
    directory = scratch / f"{model}-{workload}"
    python("prepare", "--model", model, "--workload", workload, "--directory", str(directory))
    words = ["--checkpoint", str(directory / "checkpoint"), "--batch", str(directory / "batch.npz")]
    words += ["--steps", str(steps)]
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {
        side: {layout: [] for layout in layouts} for side, layouts in LAYOUTS.items()
    }
    for number in range(rounds):
        for side in LAYOUTS:
            for layout in contenders(runs[side]) if number else LAYOUTS[side]:
                printed = json.loads(python(f"{side}_side", *words, "--layout", layout))
                runs[side][layout].append(printed)
                print(f"{model} {workload}: {side} {layout} {_talk(printed)}", file=sys.stderr)
    with np.load(directory / "batch.npz") as batch:
        rows = rows_of(dict(batch))
    return compare(model, workload, rows, runs)


def _talk(run: dict[str, Any]) -> str:
    return f"{min(run['cpu']):.3f} s, peak {run['peak_mb']:.0f} MB, growth {run['growth_mb']:.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of every layout")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    options = parser.parse_args()
    before, parts = load(), []
    with tempfile.TemporaryDirectory() as scratch:
        for model in options.models:
            for workload in options.workloads:
                parts.append(run_part(model, workload, options.steps, options.rounds, Path(scratch)))
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "cores": cores(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "steps": options.steps,
        "rounds": options.rounds,
        "load": [before, load()],
        "rows": parts,
    }
    if options.write is not None:
        write_section(options.write, "trainer", markdown(result))
    print(json.dumps(result, default=dataclasses.asdict) if options.json else markdown(result))
    sys.exit(0 if all(row["met"] for row in parts) else 1)


if __name__ == "__main__":
    main()
