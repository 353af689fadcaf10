"""Carrying a plan out: groups of weights in parallel, each credited once it is safe, the target at the end.

Whatever is in memory belongs to the groups at work, one for each worker, and of them a strip of rows.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from miles.errors import CheckpointError, MilesError
from miles.weights.atomic import flush_to_disk
from miles.weights.convert.dcp_write import write_dcp_file
from miles.weights.convert.fresh import FreshWeights
from miles.weights.convert.hashes import sha256_of, verified_sha256
from miles.weights.convert.journal import Journal
from miles.weights.convert.manifest import fingerprint, write_companions, write_manifest
from miles.weights.convert.plan import Conversion, partial_directory
from miles.weights.convert.reader import SafetensorsReader
from miles.weights.convert.shard_file import ShardFile
from miles.weights.convert.shards import Group, Shard
from miles.weights.convert.transfer import Outcome, Transfer

Progress = Callable[[int, int, str], None]
"""Called with bytes of weights that are done, bytes of all, and the file that they went into."""
Check = Callable[[Path], dict[str, Any]]
"""Looks at the complete files before they become the target; what it says goes into the manifest."""


def convert(
    plan: Conversion,
    workers: int | None = None,
    verify: bool = True,
    progress: Progress | None = None,
    check: Check | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write the target, which appears whole or not at all; return its manifest.

    A conversion that was killed goes on where it stopped, and ends in the same bytes.

    Args:
        workers: groups at work at the same time; default: one for each core.
        verify: read every weight back, as any reader would, and note its error in the manifest.
        notice: called with what a person who watches wants to know beside the progress.

    Raises CheckpointError or MilesError naming the file or weight at fault; nothing is kept then, unless the
    disk was full.
    """
    try:
        journal = Journal(plan.target, fingerprint(plan, verify))
    except OSError as error:
        raise _refused(error, plan.target) from error
    try:
        manifest = _carried_out(plan, journal, workers, verify, progress, check, notice)
    except OSError as error:
        journal.close(remove=False)
        raise _refused(error, plan.target) from error
    except MilesError:
        # Weights that are complete are kept where only their place is taken.
        journal.close(remove=not plan.target.exists())
        raise
    except BaseException:
        journal.flush()
        journal.close(remove=False)
        raise
    journal.close(remove=True)
    return manifest


def _carried_out(
    plan: Conversion,
    journal: Journal,
    workers: int | None,
    verify: bool,
    progress: Progress | None,
    check: Check | None,
    notice: Callable[[str], None],
) -> dict[str, Any]:
    if journal.discarded:
        notice("begun anew: there was work on another conversion into this target")
    if journal.outcomes:
        notice(f"going on: {len(journal.outcomes):,} of {len(plan.moves):,} weights are written already")
    with _one_thread_per_worker():
        work = _Work(plan, journal, verify, progress)
        work.run(workers or os.cpu_count() or 1)
        write_companions(plan, journal.files, journal.places)
        told = {}
        if check is not None:
            notice("comparing what both models predict")
            told = check(journal.files)
    manifest = write_manifest(plan, journal, work.source_hashes, told)
    _publish(journal.files, plan.target)
    return manifest


def _refused(error: OSError, target: Path) -> CheckpointError:
    """The system refused: a full disk, a directory that may not be written, a disk that fails."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return CheckpointError(
        "no space left on the disk" if full else f"the system refused: {error.strerror}",
        where=str(error.filename or target),
        why=f"the work so far is kept in {partial_directory(target)}" if full else "",
        fix="free space and run the command again: it goes on where it stopped"
        if full
        else "mend it, and run the command again",
    )


class _Work:
    """The groups of a plan that are not credited yet."""

    def __init__(self, plan: Conversion, journal: Journal, verify: bool, progress: Progress | None) -> None:
        self.source_hashes: dict[str, str] = {}
        self._plan, self._journal, self._progress = plan, journal, progress
        self._written = SafetensorsReader()
        self._transfer = Transfer(plan.source.reader, self._written, FreshWeights(plan), verify)
        self._stop = threading.Event()
        self._left: dict[str, int] = {}
        self._guard = threading.Lock()
        self._done = 0

    def run(self, workers: int) -> None:
        files = {shard.file: ShardFile(self._journal.files, shard) for shard in self._plan.shards}
        try:
            with ThreadPoolExecutor(workers) as pool:
                try:
                    for future in [pool.submit(self._stopping, task) for task in self._tasks(files)]:
                        future.result()
                except BaseException:
                    self._stop.set()
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            self._plan.source.reader.close()
            self._written.close()
            for file in files.values():
                file.close()

    def _tasks(self, files: dict[str, ShardFile]) -> Iterator[Callable[[], None]]:
        """Files of the source are hashed just before their weights are read."""
        waiting = list(self._plan.source.files)
        for shard in self._plan.shards:
            self._left[shard.file] = len(shard.groups)
            for group in shard.groups:
                for path in {e.file for one in group for e in one.weight.parts.values()} & set(waiting):
                    waiting.remove(path)
                    yield self._hash_task(path)
                if self._plan.wanted.layout != "dcp":
                    yield self._group_task(group, shard, files[shard.file])
            if self._plan.wanted.layout == "dcp":
                yield self._file_task(shard)
        yield from map(self._hash_task, waiting)

    def _hash_task(self, path: Path) -> Callable[[], None]:
        def task() -> None:
            self.source_hashes[str(path)] = verified_sha256(path)

        return task

    def _group_task(self, group: Group, shard: Shard, file: ShardFile) -> Callable[[], None]:
        def task() -> None:
            if not all(one.name in self._journal.outcomes for one in group):
                outcomes: dict[str, Outcome] = self._transfer.run(group, file)
                self._journal.add(outcomes, file, sum(one.weight.nbytes for one in group))
            if self._finished(group, shard):
                self._complete(shard, file)

        return task

    def _file_task(self, shard: Shard) -> Callable[[], None]:
        """A file that is written from front to back."""

        def task() -> None:
            path = self._journal.files / shard.file
            if shard.file not in self._journal.hashes:
                outcomes, places = write_dcp_file(path, shard, self._transfer)
                self._journal.add_file(shard.file, sha256_of(path), outcomes, places)
            for group in shard.groups:
                self._finished(group, shard)

        return task

    def _finished(self, group: Group, shard: Shard) -> bool:
        """Whether this was the last group of its file."""
        with self._guard:
            self._done += sum(one.weight.nbytes for one in group)
            self._left[shard.file] -= 1
            complete, done = self._left[shard.file] == 0, self._done
        if self._progress is not None:
            self._progress(done, self._plan.bytes_in, shard.file)
        return complete

    def _complete(self, shard: Shard, file: ShardFile) -> None:
        """Hash a file whose weights are all there; with many files, only those at work are open."""
        if shard.file not in self._journal.hashes:
            self._journal.flush()
            self._journal.add_hash(shard.file, sha256_of(file.path))
        self._written.forget(file.path)
        file.close()

    def _stopping(self, task: Callable[[], None]) -> None:
        """The first failure ends all that waits."""
        if self._stop.is_set():
            return
        try:
            task()
        except BaseException:
            self._stop.set()
            raise


def _publish(files: Path, target: Path) -> None:
    for path in sorted(files.rglob("*")):
        flush_to_disk(path)
    flush_to_disk(files)
    if target.exists():
        raise CheckpointError("came into being meanwhile", where=str(target), fix="choose another directory")
    shutil.move(files, target)
    flush_to_disk(target.parent)


@contextmanager
def _one_thread_per_worker() -> Iterator[None]:
    """Groups are small: workers beside each other are faster than threads inside one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
