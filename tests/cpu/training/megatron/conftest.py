"""megatron-core on CPU: the tests of this directory need it."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from e2e_support import PATIENCE_S
from preloaded import MEGATRON, Preloaded

pytest.importorskip("megatron.core")

Cases = dict[str, tuple[str, dict[str, Any]]]


def run_world(size: int, directory: Path, cases: Cases) -> list[dict[str, Any]]:
    """The results of `cases` on every rank of a world of `size` processes; see `rank_worker.py`."""
    directory.mkdir()
    (directory / "cases.pickle").write_bytes(pickle.dumps(cases))
    script = Path(__file__).with_name("rank_worker.py")
    path = os.pathsep.join([os.getcwd(), *sys.path])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    processes = [
        Preloaded(MEGATRON, script, (str(rank), str(size), str(directory)), environment)
        for rank in range(size)
    ]
    try:
        assert [process.wait(PATIENCE_S) for process in processes] == [0] * size
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    results = [pickle.loads((directory / f"{rank}.pickle").read_bytes()) for rank in range(size)]
    for result in results:
        for name, outcome in result.items():
            assert not (isinstance(outcome, tuple) and isinstance(outcome[0], str)), (name, outcome)
    return results


@pytest.fixture(scope="session")
def world() -> Callable[..., list[dict[str, Any]]]:
    return run_world
