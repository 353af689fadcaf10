"""Two torch threads cut matrices and runs of elements elsewhere; the bits still agree.

In a process of its own: threads must be chosen, and told not to spin, before torch loads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = ("the quickstart's experts", "odd widths", "dense")
DTYPES = ("float32", "bfloat16")
PATIENCE_S = 1800
SCRIPT = f"""
import json
import torch
torch.set_num_threads(2)
from alignment_support import SPECS, Sides, Traffic
from miles.models.invariance import find_exact_numerics

for name in {NAMES}:
    for dtype in {DTYPES}:
        found = find_exact_numerics(SPECS[name], getattr(torch, dtype))
        sides = [
            Sides(SPECS[name], found, getattr(torch, dtype)).differing(traffic)
            for traffic in (
                Traffic(group=3, slots=5),
                Traffic((140, 7), (20, 60), group=8, slots=64, micro_batch=3),
                Traffic((1030,) * 8, (9,) * 8, group=4, slots=32),
            )
        ]
        print(json.dumps([name, dtype, found.threads, sides]), flush=True)
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str], tuple[int, list[tuple[int, int]]]]:
    """Threads, and by traffic the tokens that differ and those compared; by model and number format."""
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parent,
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {(name, dtype): (threads, sides) for name, dtype, threads, sides in rows}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_two_threads_agree(name: str, dtype: str, outcomes) -> None:  # type: ignore[no-untyped-def]
    threads, sides = outcomes[name, dtype]
    assert threads == 2 and len(sides) == 3
    for wrong, compared in sides:
        assert compared > 200 and wrong == 0
