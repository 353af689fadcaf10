"""Directories in which something is made before it gets its name in the cache, and what is left of them where
the process was killed.

Whoever makes something holds a shared lock on the directory around it, which the system takes back with the
process. So nobody works there where an exclusive one is to be had.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOREIGN_SECONDS = 24 * 3600
"""Age from which what another machine left in a shared cache has nobody: locks need not reach it."""


@contextmanager
def scratch_directory(parent: Path, prefix: str) -> Iterator[Path]:
    """A new directory in `parent`, gone afterwards unless it was renamed. Raises OSError."""
    handle = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        scratch = Path(tempfile.mkdtemp(prefix=f"{prefix}{_host()}-", dir=parent))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    finally:
        os.close(handle)


def sweep(parent: Path, prefix: str) -> None:
    """Remove the scratch directories that killed processes left; none while a process of this machine works
    beside them, or where that cannot be told."""
    left = [path for path in parent.glob(f"{prefix}*") if path.is_dir()]
    if not left:
        return
    try:
        handle = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in left:
            if f"-{_host()}-" in path.name or _age(path) > FOREIGN_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
    except OSError:
        return  # somebody works here, or the file system has no locks
    finally:
        os.close(handle)


def _host() -> str:
    return socket.gethostname()


def _age(path: Path) -> float:
    return time.time() - path.stat().st_mtime
