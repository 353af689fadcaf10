"""The program as a user starts it: a process of its own, away from the user's cache and runs."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]
LEFT_OUT = ("OMP_", "NVTE_", "CUDA_")
TIMEOUT_S = 120


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A quiet shell: no thread variables, no colour, its own cache and runs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LEFT_OUT)}
    return kept | {
        "MILES_CACHE_DIR": str(tmp_path / "cache"),
        "MILES_RUNS_DIR": str(tmp_path / "runs"),
        "NO_COLOR": "1",
        "COLUMNS": "100",
        "TERM": "dumb",
    }


@pytest.fixture(scope="session")
def started_once() -> Iterator[subprocess.Popen[str]]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LEFT_OUT)}
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("started_once.py"))],
        env=kept | {"NO_COLOR": "1", "COLUMNS": "100", "TERM": "dumb"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.stdin.close()  # type: ignore[union-attr]
    process.wait(timeout=30)


@pytest.fixture
def miles(
    environment: dict[str, str],
    started_once: subprocess.Popen[str],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """`miles WORDS` in an empty directory, without a terminal."""
    said = tmp_path_factory.mktemp("said")

    def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        out, err = said / "stdout", said / "stderr"
        for file in (out, err):
            file.write_bytes(b"")
        call = {
            "words": words,
            "cwd": str(tmp_path),
            "environment": environment | variables,
            "stdout": str(out),
            "stderr": str(err),
        }
        assert started_once.stdin is not None and started_once.stdout is not None
        started_once.stdin.write(json.dumps(call) + "\n")
        started_once.stdin.flush()
        ready, _, _ = select.select([started_once.stdout], [], [], TIMEOUT_S)
        assert ready, f"miles {' '.join(words)} takes longer than {TIMEOUT_S} s"
        code = int(started_once.stdout.readline())
        return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())

    return run
