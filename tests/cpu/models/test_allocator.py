"""Freed activations are reused, not given back to the kernel and faulted in again."""

from __future__ import annotations

import subprocess
import sys

import pytest

MEASURE = """
import resource, torch
from miles.models.allocator import keep_freed_memory
def faults():
    for _ in range(10):  # 40 MiB is more than glibc keeps by itself, and less than we do
        torch.full((10 << 20,), 1.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.full((10 << 20,), 1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = faults()
assert keep_freed_memory()
print(before, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_repeated_steps_take_no_new_pages() -> None:
    command = [sys.executable, "-c", MEASURE]
    before, kept = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(kept) < 100 < int(before)
