"""C++ sources made into a library: compiled once per source, compiler and processor, kept in miles' cache."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from miles import environment
from miles.errors import MilesError

HERE = Path(__file__).parent
FLAGS: tuple[str, ...] = (
    *("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    *("-fopenmp-simd", "-fPIC", "-shared"),
)
"""Products and sums are joined where the sources say so, see vectors.h."""
CPUINFO = Path("/proc/cpuinfo")
COMPILE_SECONDS = 300
"""Idle it takes seven; a machine with much else to do is no reason to go without."""


class BuildFailed(MilesError):
    """The compiler did not make the library. A run goes on without it."""


@dataclass(frozen=True)
class Sources:
    """The units of a library in one directory; its headers, and those of this one, may be included."""

    name: str
    directory: Path
    units: tuple[str, ...]

    @property
    def headers(self) -> list[Path]:
        return sorted({*self.directory.glob("*.h"), *HERE.glob("*.h")})


TRAINING = Sources("training", HERE, ("attention.cpp", "experts.cpp", "norm.cpp", "rows.cpp"))


def library(compiler: str, sources: Sources = TRAINING) -> Path:
    """The shared library for this machine, compiled if the cache has none. Safe beside other processes.

    Raises: BuildFailed with the compiler's first complaint.
    """
    target = environment.cache_dir() / "kernels" / f"{sources.name}-{_key(compiler, sources)}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=target.parent, prefix=".building-", suffix=".so")
        os.close(handle)
        try:
            units = (str(sources.directory / unit) for unit in sources.units)
            _run([compiler, *FLAGS, _native(), f"-I{HERE}", *units, "-o", scratch])
            os.replace(scratch, target)
        finally:
            Path(scratch).unlink(missing_ok=True)
    return target


def _key(compiler: str, sources: Sources) -> str:
    """Names everything that the library depends on."""
    digest = hashlib.sha256()
    for source in (*(sources.directory / unit for unit in sources.units), *sources.headers):
        digest.update(source.read_bytes())
    for part in (*FLAGS, _native(), _run([compiler, "--version"]), _processor()):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


def _native() -> str:
    return "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"


def _processor() -> str:
    """Model and instruction sets, as far as the system tells."""
    wanted = ("model name", "flags", "Features", "CPU part")
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)})) or platform.processor()


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(f"{command[0]} did not run", why=str(error)) from error
    if done.returncode != 0:
        complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise BuildFailed(f"{command[0]} ended with {done.returncode}", why=complaint.strip())
    return done.stdout
