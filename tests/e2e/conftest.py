"""One warm start, shared by all tests and workers."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_support import SMALL, Cli, copy_kernels
from sglang_support import assert_ended, server_processes, serving

from miles import environment
from miles.rollout.sglang.server import ServerProcess

WARM = "warm-checkpoint"
"""A link: runs of other models add checkpoints of their own to the cache."""


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which the built-in checkpoint has been warm-started once, whatever the number of workers.

    Kernels that this checkout has compiled already come along; `test_quickstart` begins with nothing.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    cache = root / "miles-cache"
    with (root / "miles-cache.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (cache / "checkpoints").is_dir():
            copy_kernels(environment.cache_dir(), cache)
            warm = Cli(cache, root / "warm-runs")
            done = warm("train", *SMALL, "--num-rollout", "1", "--skip-eval-before-train")
            assert done.returncode == 0, done.stderr
            (found,) = (cache / "checkpoints").iterdir()
            (cache / WARM).symlink_to(found)
    return cache


@pytest.fixture(scope="session")
def warm_checkpoint(shared_cache: Path) -> Path:
    """The quickstart MoE after its warm start; its head is tied to its embedding."""
    return (shared_cache / WARM).resolve()


@pytest.fixture(scope="session")
def sglang_server(warm_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for all tests that do not start their own; its weights are those of the last user."""
    with serving(warm_checkpoint, tmp_path_factory.mktemp("server") / "server.log") as server:
        yield server


@pytest.fixture
def no_server_is_left() -> Iterator[None]:
    """Servers that a test starts end with it."""
    before = server_processes()
    yield
    assert_ended(before)


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
