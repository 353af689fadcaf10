"""The program as a user starts it: a process of its own, away from the user's cache and runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import preloaded
import pytest

from miles.data import tasks
from miles_cli.init.schema_file import write_schema

Run = Callable[..., "subprocess.CompletedProcess[str]"]
LEFT_OUT = ("OMP_", "NVTE_", "CUDA_")
TIMEOUT_S = 600


@pytest.fixture(scope="session")
def used_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache after the first command: the files of the built-in task and the schema of a run file."""
    cache = tmp_path_factory.mktemp("used") / "cache"
    tasks.assets("sort", cache_dir=cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MILES_CACHE_DIR", str(cache))
        write_schema()
    return cache


@pytest.fixture
def cache(used_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of it for one test."""
    return Path(shutil.copytree(used_cache, tmp_path_factory.mktemp("cache") / "cache"))


@pytest.fixture
def environment(tmp_path: Path, cache: Path) -> dict[str, str]:
    """A quiet shell: no thread variables, no colour, its own cache and runs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LEFT_OUT)}
    return kept | {
        "MILES_CACHE_DIR": str(cache),
        "MILES_RUNS_DIR": str(tmp_path / "runs"),
        "NO_COLOR": "1",
        "COLUMNS": "100",
        "TERM": "dumb",
    }


@pytest.fixture
def miles(environment: dict[str, str], tmp_path: Path) -> Run:
    """`miles WORDS` in an empty directory, without a terminal."""

    def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        process = preloaded.miles(words, environment | variables, tmp_path, preloaded.PLANS)
        out, err = process.communicate(timeout=TIMEOUT_S)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    return run
