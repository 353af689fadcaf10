"""Freed activations are reused, not given back to the kernel and faulted in again."""

from __future__ import annotations

import subprocess
import sys

import pytest

MEASURE = """
import resource, sys, torch
from miles.models.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():  # 40 MiB is more than glibc keeps by itself, and less than we do
    torch.full((10 << 20,), 1.0)
for _ in range(10):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_repeated_steps_take_no_new_pages() -> None:
    def faults(mode: str) -> int:
        command = [sys.executable, "-c", MEASURE, mode]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < 100 < faults("default")
