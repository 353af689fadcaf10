"""One warm start, shared by all tests and workers."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_support import SMALL, Cli


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which the built-in checkpoint has been warm-started once, whatever the number of workers."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    cache = root / "miles-cache"
    with (root / "miles-cache.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (cache / "checkpoints").is_dir():
            warm = Cli(cache, root / "warm-runs")
            done = warm("train", *SMALL, "--num-rollout", "1", "--skip-eval-before-train")
            assert done.returncode == 0, done.stderr
    return cache


@pytest.fixture
def cli(shared_cache: Path, tmp_path: Path) -> Iterator[Cli]:
    instance = Cli(shared_cache, tmp_path / "runs")
    yield instance
    instance.kill_leftovers()


@pytest.fixture(scope="session")
def uninterrupted(shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run, left alone."""
    cli = Cli(shared_cache, tmp_path_factory.mktemp("uninterrupted"))
    done = cli("train", *SMALL)
    assert done.returncode == 0, done.stderr
    return cli.only_run()
