"""Two torch threads cut matrices and runs of elements elsewhere; the bits still agree.

In a process of its own: threads must be chosen, and told not to spin, before torch loads.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
torch.set_num_threads(2)
from alignment_support import SPECS, Sides, Traffic
from miles.models.invariance import find_exact_numerics

spec = SPECS["{name}"]
found = find_exact_numerics(spec, torch.{dtype})
assert found.threads == 2
for traffic in (
    Traffic(group=3, slots=5),
    Traffic((140, 7), (20, 60), group=8, slots=64, micro_batch=3),
    Traffic((1030,) * 8, (9,) * 8, group=4, slots=32),
):
    wrong, compared = Sides(spec, found, torch.{dtype}).differing(traffic)
    assert compared > 200 and wrong == 0, (traffic, wrong, compared)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["the quickstart's experts", "odd widths", "dense"])
def test_two_threads_agree(name: str, dtype: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(name=name, dtype=dtype)],
        cwd=Path(__file__).parent,
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
