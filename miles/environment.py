"""Every environment variable that miles reads or exports, in one place.

No other module touches `os.environ`.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Variable:
    """One documented environment variable."""

    name: str
    meaning: str


VARIABLES = (
    Variable("MILES_RUNS_DIR", "where run directories go (default: runs/ in the working directory)"),
    Variable("MILES_CACHE_DIR", "where built-in checkpoints and data are kept (default: ~/.cache/miles)"),
    Variable("OMP_NUM_THREADS", "threads of torch's CPU kernels; the plan sets it when it is not set"),
    Variable("OMP_WAIT_POLICY", "PASSIVE: idle threads sleep; the plan sets it when it uses several threads"),
    Variable(
        "NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "FP8 block scales, 1: FP32 (Hopper), 0: powers of 2 (Blackwell)"
    ),
    Variable("CUDA_VISIBLE_DEVICES", "the GPUs that this shell shows to its programs"),
    Variable("PYTORCH_CUDA_ALLOC_CONF", "torch's CUDA allocator; preflight compares it with the plan"),
    Variable("CUDA_DEVICE_MAX_CONNECTIONS", "1 is required by Megatron's overlap of communication on Hopper"),
    Variable(
        "GLOO_SOCKET_IFNAME", "network interface of gloo; set to loopback for trainer ranks on one machine"
    ),
    Variable("RAY_ADDRESS", "the Ray cluster of this shell: `miles init` suggests it"),
    Variable("RAY_AUTH_MODE", "Ray's access control; set to `token` where a token is at hand"),
    Variable("RAY_AUTH_TOKEN", "the token of a Ray cluster; a private runtime gets one of its own"),
    Variable("RAY_AUTH_TOKEN_PATH", "the file with the token (default: ~/.ray/auth_token)"),
    Variable("RAY_USAGE_STATS_ENABLED", "0: Ray reports nothing; set when it is not set"),
    Variable("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0: Ray listens on loopback only; set for a private one"),
    Variable("RAY_JOB_STOP_WAIT_TIME_S", "seconds a stopped job has to save; set for submitted runs"),
    Variable("NO_COLOR", "no colour in the terminal"),
    Variable("TERM", "the kind of terminal; `dumb` means plain lines"),
    Variable("LC_ALL", "the locale; without UTF-8 the dashboard draws in ASCII"),
    Variable("LC_CTYPE", "as LC_ALL, asked next"),
    Variable("LANG", "as LC_CTYPE, asked last"),
    Variable("CI", "set on build machines; means plain lines"),
    Variable("COMP_WORDS", "the command line that bash is completing"),
    Variable("_TYPER_COMPLETE_ARGS", "the command line that zsh or fish is completing"),
)


def get(name: str) -> str | None:
    """The value of a declared variable, or None when unset or empty."""
    assert any(v.name == name for v in VARIABLES), f"{name} is not declared in VARIABLES"
    return os.environ.get(name) or None


REPORTED = (
    "CUDA_",
    "GLOO_",
    "HF_",
    "HIP_",
    "MASTER_",
    "MILES_",
    "MKL_",
    "NCCL_",
    "NVIDIA_",
    "NVTE_",
    "OMP_",
    "PYTHON",
    "PYTORCH_",
    "RAY_",
    "SGLANG_",
    "SLURM_",
    "TORCH",
    "TRANSFORMERS_",
    "TRITON_",
    "UCX_",
    "WANDB_",
    "LD_",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
)
"""Beginnings of the names of variables that a report of the surroundings shows."""


def reported() -> dict[str, str]:
    """Variables that libraries of a run listen to, declared by us or not. Values are not redacted."""
    ours = {variable.name for variable in VARIABLES}
    return {n: v for n, v in sorted(os.environ.items()) if n in ours or n.startswith(REPORTED)}


def user_names(path: Path | None = None) -> set[str]:
    """Names of the present user and of the owner of `path`, for taking them out of reports."""
    uids = {os.getuid()} | ({path.stat().st_uid} if path is not None else set())
    names = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "SUDO_USER")}
    known = {entry.pw_uid: entry.pw_name for entry in pwd.getpwall()}
    return {name for name in names | {known.get(uid, "") for uid in uids} if name}


def runs_dir() -> Path:
    """The directory that holds run directories."""
    return Path(get("MILES_RUNS_DIR") or "runs")


def cache_dir() -> Path:
    """The directory for assets that miles makes itself."""
    configured = get("MILES_CACHE_DIR")
    return Path(configured) if configured else Path.home() / ".cache" / "miles"


def export(name: str, value: str) -> None:
    """Set a declared variable for this process and its children."""
    assert any(v.name == name for v in VARIABLES), f"{name} is not declared in VARIABLES"
    os.environ[name] = value


def export_default(name: str, value: str) -> None:
    """Set a declared variable unless the user has set it."""
    if get(name) is None:
        export(name, value)


def take_back(name: str) -> None:
    """Unset a variable of this process."""
    os.environ.pop(name, None)


def of_child(more: Mapping[str, str]) -> dict[str, str]:
    """The environment of a program that we start: ours, with `more` on top."""
    return {**os.environ, **more}
