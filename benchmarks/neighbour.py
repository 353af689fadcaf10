"""The demo beside busy processes: how much slower is a step when every core has other work as well?

    python benchmarks/neighbour.py

A pool of spinning threads is a thousand times slower beside one busy process; one thread per process only
shares the core. Runs of the quickstart alone and beside one endless loop per core take turns; the ratio of
the median step times must not exceed 2.5. Exit code 1: it does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from laptop.machine import cores, load, processor
from laptop_grpo import run_miles

BAR = 2.5
WARM_STEPS = 3


@contextmanager
def busy_neighbours(count: int) -> Iterator[None]:
    """`count` processes that never rest; they end with the block."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def step_ms(neighbours: int, steps: int, seed: int, scratch: Path) -> list[float]:
    """Wall time of each step of one run, the first ones left out."""
    with busy_neighbours(neighbours):
        run = run_miles(seed, steps, scratch)
    return [1000 * step["whole"]["wall"] for step in run["steps"][WARM_STEPS:]]


def measure(repeats: int, steps: int, neighbours: int) -> dict[str, Any]:
    """Alone and beside the neighbours, in turn."""
    before = load()
    alone: list[float] = []
    beside: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(repeats):
            alone += step_ms(0, steps, 0, Path(scratch))
            beside += step_ms(neighbours, steps, 0, Path(scratch))
    return {
        "processor": processor(),
        "cores": cores(),
        "neighbours": neighbours,
        "load_before": before,
        "alone_ms": median(alone),
        "beside_ms": median(beside),
        "ratio": median(beside) / median(alone),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--neighbours", type=int, default=cores(), help="busy processes; default: one per core"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(options.repeats, options.steps, options.neighbours)
    if options.json:
        print(json.dumps(result))
    else:
        print(
            f"{result['processor']}, {result['cores']} cores, load before {result['load_before']:.1f}\n"
            f"step alone {result['alone_ms']:.0f} ms, beside {result['neighbours']} busy processes "
            f"{result['beside_ms']:.0f} ms: {result['ratio']:.2f}x (bar {BAR}x)"
        )
    sys.exit(0 if result["ratio"] <= BAR else 1)


if __name__ == "__main__":
    main()
