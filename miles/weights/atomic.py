"""Directories and files that appear whole or not at all, also after a crash or on a full disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from miles.errors import CheckpointError


@contextmanager
def staged_directory(destination: Path) -> Iterator[Path]:
    """A fresh directory to fill; on success it is flushed to disk and renamed to `destination`.

    On any failure it is removed and `destination` stays as it was: absent. Raises `CheckpointError` when
    `destination` already exists, or the disk is full.
    """
    if destination.exists():
        raise CheckpointError("already exists", where=str(destination), fix="choose another directory")
    stage = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        yield stage
        for path in sorted(stage.rglob("*")):
            flush_to_disk(path)
        flush_to_disk(stage)
        stage.rename(destination)
        flush_to_disk(destination.parent)
    except BaseException as error:
        shutil.rmtree(stage, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                "no space left on the disk: nothing was written",
                where=str(destination),
                fix="free space, or lower keep_checkpoints",
            ) from error
        raise


def flush_to_disk(path: Path) -> None:
    """fsync a file or a directory's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
