"""What a run stands on: versions, hardware, limits and the environment variables that matter.

Versions are read from package metadata, so nothing heavy is imported; the GPU is asked through nvidia-smi.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from miles import environment
from miles._version import __version__
from miles.diagnosis.redact import Redactor

PACKAGES = (
    "torch",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "ray",
    "sglang",
    "sglang-router",
    "flashinfer-python",
    "flash-attn",
    "megatron-core",
    "megatron-bridge",
    "transformer-engine",
    "triton",
    "deepspeed",
    "vllm",
    "verl",
    "trl",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
    "pydantic",
    "textual",
    "tensorboard",
    "wandb",
    "py-spy",
)
GPU_FIELDS = "name,memory.total,driver_version,compute_cap"
SECONDS = 10


def surroundings(redactor: Redactor) -> dict[str, dict[str, Any]]:
    """Sections of name and value; what cannot be told is absent."""
    return {
        "versions": _versions(),
        "machine": _machine(),
        "gpus": _gpus(),
        "limits": _limits(),
        "variables": {name: redactor.variable(name, value) for name, value in environment.reported().items()},
    }


def _versions() -> dict[str, str]:
    found = {"miles": __version__, "python": platform.python_version(), "executable": sys.executable}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["executable"] = Redactor().text(sys.executable)
    return found


def _machine() -> dict[str, Any]:
    machine: dict[str, Any] = {"system": platform.platform(), "cpus": len(os.sched_getaffinity(0))}
    cpu = _first_line("/proc/cpuinfo", "model name")
    if cpu:
        machine["cpu"] = cpu
    memory = _first_line("/proc/meminfo", "MemTotal")
    if memory:
        machine["memory_gb"] = round(int(memory.split()[0]) / 1024**2, 1)
    if Path("/dev/shm").is_dir():
        machine["shared_memory_free_gb"] = round(shutil.disk_usage("/dev/shm").free / 1e9, 1)
    machine["disk_free_gb"] = round(shutil.disk_usage(".").free / 1e9, 1)
    return machine


def _first_line(file: str, key: str) -> str | None:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def _gpus() -> dict[str, str]:
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"nvidia-smi": f"no answer within {SECONDS} s"}
    if done.returncode != 0:
        return {"nvidia-smi": (done.stderr or done.stdout).strip()[:200]}
    return {str(i): line.strip() for i, line in enumerate(done.stdout.splitlines()) if line.strip()}


def _limits() -> dict[str, str]:
    limits = {"open files": resource.RLIMIT_NOFILE, "locked memory": resource.RLIMIT_MEMLOCK}
    return {name: _limit(resource.getrlimit(which)[0]) for name, which in limits.items()}


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)
