"""The C++ compiler and the vector instructions that this machine has, for the decode kernel."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

COMPILERS = ("c++", "g++", "clang++")
CPUINFO = Path("/proc/cpuinfo")
INSTRUCTIONS = (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("asimd", "NEON"))
"""Flag in /proc/cpuinfo -> name, widest first."""


@dataclass(frozen=True)
class CompilerFacts:
    """`path` of the first compiler found, and the name of the widest vector instructions known."""

    path: str
    vectors: str


def read_compiler() -> CompilerFacts | None:
    """None where there is no compiler."""
    found = next((path for name in COMPILERS if (path := shutil.which(name)) is not None), None)
    return None if found is None else CompilerFacts(found, _vectors())


def _vectors() -> str:
    flags: set[str] = set()
    if CPUINFO.exists():
        for line in CPUINFO.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                flags = set(line.partition(":")[2].split())
                break
    known = next((name for flag, name in INSTRUCTIONS if flag in flags), None)
    return known or ("NEON" if platform.machine() in ("arm64", "aarch64") else "128-bit vectors")
