"""What the numbers were measured on, and how busy it was."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def processor() -> str:
    """Model name of the processor, as the system gives it."""
    if CPUINFO.exists():
        for line in CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Logical cores."""
    return os.cpu_count() or 1


def load() -> float:
    """Processes that wanted a core, averaged over the last minute."""
    return os.getloadavg()[0]
