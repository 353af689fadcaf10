"""What this machine has: cores, memory, disk and GPUs, without loading torch."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from miles.environment import get
from miles.planning.facts.compiler import CompilerFacts, read_compiler
from miles.planning.facts.packages import installed_versions

PLAN_VARIABLES = (
    "OMP_NUM_THREADS",
    "NVTE_FP8_BLOCK_SCALING_FP32_SCALES",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_CUDA_ALLOC_CONF",
)
"""The variables whose value changes a run; preflight compares them with the plan."""

SHARED_MEMORY = Path("/dev/shm")

NVIDIA_SMI_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver names it."""

    name: str
    memory_bytes: int
    sm: int | None = None
    """Compute capability x 10; None where the driver does not say."""


@dataclass(frozen=True)
class MachineFacts:
    """The machine that this process runs on.

    `cores` are those this process may use (its affinity and cgroup quota), not those in the box.
    """

    cores: int
    memory_bytes: int
    memory_available_bytes: int
    disk_path: str
    disk_free_bytes: int
    gpus: tuple[Gpu, ...]
    environment: tuple[tuple[str, str], ...]
    shared_memory_bytes: int | None = None
    """Size of /dev/shm; None where there is none."""
    open_files: int | None = None
    """Files that a process may have open (`ulimit -n`); None without a limit."""
    packages: tuple[tuple[str, str], ...] = ()
    """Installed packages that matter to a run, with their versions."""
    compiler: CompilerFacts | None = None
    """The C++ compiler; None where there is none."""

    def package(self, name: str) -> str | None:
        """The installed version of a package, or None."""
        return dict(self.packages).get(name)

    def variable(self, name: str) -> str | None:
        """The value that the shell gave to one of `PLAN_VARIABLES`, or None."""
        return dict(self.environment).get(name)


def read_machine(output_dir: Path) -> MachineFacts:
    """Facts of this machine; free disk space is that of the file system that `output_dir` will be on."""
    memory = psutil.virtual_memory()
    existing = _existing_ancestor(output_dir)
    return MachineFacts(
        cores=_usable_cores(),
        memory_bytes=memory.total,
        memory_available_bytes=memory.available,
        disk_path=str(existing),
        disk_free_bytes=shutil.disk_usage(existing).free,
        gpus=_gpus(),
        environment=tuple((name, value) for name in PLAN_VARIABLES if (value := get(name)) is not None),
        shared_memory_bytes=shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else None,
        open_files=_open_files(),
        packages=installed_versions(),
        compiler=read_compiler(),
    )


def _open_files() -> int | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def _usable_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    return cores


def _existing_ancestor(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _gpus() -> tuple[Gpu, ...]:
    """GPUs by `nvidia-smi`; none when the driver is absent or does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = [program, "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return ()
    if answer.returncode != 0:
        return ()
    rows = [line.rsplit(",", 2) for line in answer.stdout.splitlines() if line.count(",") >= 2]
    return tuple(
        Gpu(name.strip(), int(mebibytes) * 1024**2, _sm(capability)) for name, mebibytes, capability in rows
    )


def _sm(capability: str) -> int | None:
    """`9.0` is 90, `[N/A]` is None."""
    digits = capability.strip().replace(".", "")
    return int(digits) if digits.isdigit() else None
