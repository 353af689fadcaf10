"""The quickstart against TRL's GRPOTrainer: same model, prompts, samples per prompt, optimizer, one thread.

    python benchmarks/laptop_grpo.py                       # both in this interpreter
    python benchmarks/laptop_grpo.py --trl-python VENV/bin/python

TRL comes with the extra `bench`: `pip install -c constraints.txt -e '.[bench]'`. Each run is a process of its
own, the two sides take turns, every figure is the median over the seeds. The table goes to stdout, `--json`
prints everything, `--write docs/benchmarks.md` replaces the result in that page. Exit code 1: the bar is
missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from laptop.comparison import compare, meets_bar
from laptop.machine import cores, load, processor
from laptop.page import write_section
from laptop.report import markdown

HERE = Path(__file__).parent
ROOT = HERE.parent
UNAVAILABLE = 4
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}",
}


def side(python: str, module: str, *words: str) -> dict[str, Any]:
    """Run one side in its own process and return what it printed last on stdout."""
    command = [python, "-m", f"laptop.{module}", *words]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, cwd=HERE, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_miles(seed: int, steps: int, scratch: Path) -> dict[str, Any]:
    words = ("run", "--seed", str(seed), "--steps", str(steps), "--runs-dir", str(scratch))
    return side(sys.executable, "miles_side", *words, "--spawned", str(time.time()))


def run_trl(python: str, inputs: Path, steps: int, scratch: Path) -> dict[str, Any]:
    words = ("--inputs", str(inputs), "--steps", str(steps), "--scratch", str(scratch))
    return side(python, "trl_side", *words, "--spawned", str(time.time()))


def measure(seeds: list[int], steps: int, trl_python: str, scratch: Path) -> dict[str, Any]:
    """All runs, the first side of a seed alternating."""
    runs: dict[str, list[dict[str, Any]]] = {"miles": [], "trl": []}
    for turn, seed in enumerate(seeds):
        inputs, prompt_tokens = prepare(seed, steps, scratch)
        for name in ("miles", "trl") if turn % 2 == 0 else ("trl", "miles"):
            before = load()
            print(f"seed {seed}: {name} (load {before:.1f})", file=sys.stderr)
            run = (
                run_miles(seed, steps, scratch / "runs")
                if name == "miles"
                else run_trl(trl_python, inputs, steps, scratch / f"trl-{seed}")
            )
            runs[name].append(run | {"seed": seed, "load_before": before, "prompt_tokens": prompt_tokens})
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "cores": cores(),
        "python": platform.python_version(),
        "versions": dict(_versions(runs)),
        "seeds": seeds,
        "steps": steps,
        "figures": compare(runs),
        "runs": runs,
    }


def prepare(seed: int, steps: int, scratch: Path) -> tuple[Path, float]:
    """Make the warm start and the prompt list; returns TRL's input file and prompt tokens per step."""
    prompts = scratch / f"prompts-{seed}.jsonl"
    words = ("prepare", "--seed", str(seed), "--steps", str(steps), "--prompts", str(prompts))
    inputs = side(sys.executable, "miles_side", *words) | {"prompts": str(prompts)}
    path = scratch / f"inputs-{seed}.json"
    path.write_text(json.dumps(inputs))
    tokens = sum(len(json.loads(line)["token_ids"]) for line in prompts.read_text().splitlines())
    return path, tokens * inputs["settings"]["n_samples_per_prompt"] / steps


def _versions(runs: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, str]]:
    for found in runs.values():
        yield from ((name, v) for name, v in found[0]["versions"].items() if name != "threads")


def require_trl(python: str) -> None:
    """End with a line that says how to install TRL when `python` does not have it."""
    if subprocess.run(
        [python, "-c", "import trl"], capture_output=True, env=os.environ | ENVIRONMENT
    ).returncode:
        print(
            f"TRL is not installed for {python}\n  fix: pip install -c constraints.txt -e '.[bench]', "
            "or name an interpreter that has it with --trl-python",
            file=sys.stderr,
        )
        sys.exit(UNAVAILABLE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trl-python", default=sys.executable, help="an interpreter with TRL")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--json", action="store_true", help="print every step of every run as JSON")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    options = parser.parse_args()
    require_trl(options.trl_python)
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(options.seeds, options.steps, options.trl_python, Path(scratch))
    if options.write is not None:
        write_section(options.write, "laptop_grpo", markdown(result))
    print(json.dumps(result) if options.json else markdown(result))
    sys.exit(0 if meets_bar(result["figures"]) else 1)


if __name__ == "__main__":
    main()
