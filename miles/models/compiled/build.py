"""C++ sources made into a library: compiled once per source, compiler and processor, kept in miles' cache."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from miles import environment
from miles.errors import MilesError
from miles.scratch import scratch_directory, sweep

HERE = Path(__file__).parent
FLAGS: tuple[str, ...] = (
    *("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    *("-fopenmp-simd", "-fPIC"),
)
"""Products and sums are joined where the sources say so, see vectors.h."""
CPUINFO = Path("/proc/cpuinfo")
COMPILE_SECONDS = 300
"""Of a unit. Idle the longest takes five; a machine with much else to do is no reason to go without."""
SCRATCH = ".building-"
"""Directories of builds."""


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


TRAINING = Sources(
    "training", HERE, ("experts_backward.cpp", "experts.cpp", "rows.cpp", "attention.cpp", "norm.cpp")
)
"""The longest first."""


def library(compiler: str, sources: Sources = TRAINING) -> Path:
    """The shared library for this machine, compiled if the cache has none. Safe beside other processes, and
    wherever it is interrupted: a library appears whole or not at all.

    Raises: BuildFailed with the compiler's first complaint, or where the cache cannot be written.
    """
    target = environment.cache_dir() / "kernels" / f"{sources.name}-{_key(compiler, sources)}.so"
    sweep(target.parent, SCRATCH)
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_directory(target.parent, SCRATCH) as scratch:
            made = _build(compiler, sources, scratch)
            with made.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(made, target)
    except OSError as error:
        raise BuildFailed(f"{target.parent} does not take a library", why=str(error)) from error
    return target


def _build(compiler: str, sources: Sources, scratch: Path) -> Path:
    """The library in `scratch`; units are compiled side by side."""
    objects = [scratch / f"{unit}.o" for unit in sources.units]
    commands = [
        [compiler, *FLAGS, _native(), f"-I{HERE}", "-c", str(sources.directory / unit), "-o", str(made)]
        for unit, made in zip(sources.units, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = [pool.submit(_run, command) for command in commands]
        try:
            for unit in compiled:
                unit.result()
        finally:
            pool.shutdown(cancel_futures=True)
    library = scratch / "library.so"
    _run([compiler, "-shared", *map(str, objects), "-o", str(library)])
    return library


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
