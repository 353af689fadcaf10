"""Step directories under a run's `checkpoints/`: written atomically, listed, verified, pruned.

checkpoints/step-000020/{manifest.json, loop_state.json, trainer/…}
checkpoints/LATEST                                             name of the newest complete one
checkpoints/superseded/…                                       replaced by a resume from an earlier step
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from miles.errors import CheckpointError
from miles.weights.file_manifest import STEP_MANIFEST, crc32_of, file_manifest

TAKE_OLDER = "take an older checkpoint: miles runs resume RUN --from-step N"


@dataclass(frozen=True)
class LoopState:
    """What the driver needs to go on after `step` optimizer steps as if nothing had happened.

    Random streams are keyed by (seed, step, sample), so they hold no state of their own.
    """

    step: int = 0
    prompt_cursor: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    """Wall seconds of all attempts up to this step."""
    skipped_in_a_row: int = 0
    """Optimizer steps skipped for non-finite values, counted up to this step."""
    sampling_knobs: dict[str, float] = field(default_factory=dict)
    """Live settings of the engine's side that were changed, by dotted key."""


@dataclass(frozen=True)
class Partial:
    """A checkpoint that has no name yet."""

    step: int
    path: Path


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, root: Path, keep: int | None = None) -> None:
        self.root = root
        self.keep = keep

    async def save(self, state: LoopState, write: Callable[[Path], Awaitable[None]]) -> Path:
        """Write `step-N` through a temporary directory; an interrupted write leaves the older ones valid.

        Raises: CheckpointError when the disk refuses (full, read-only), after removing the partial write.
        """
        return self.complete(await self.begin(state, write))

    async def begin(self, state: LoopState, write: Callable[[Path], Awaitable[None]]) -> Partial:
        """The part of `save` after which `write` may still be going on. What others left behind is removed:
        the temporary directory has a name of its own, since a writer may outlive a run that was killed.
        """
        for left in self.root.glob(".partial-step-*"):
            shutil.rmtree(left, ignore_errors=True)
        partial = Partial(state.step, self.root / f".partial-{_name(state.step)}-{uuid4().hex[:8]}")
        with self._undone_when_refused(partial):
            partial.path.mkdir(parents=True)
            await write(partial.path)
            _write_json(partial.path / "loop_state.json", asdict(state))
        return partial

    def complete(self, partial: Partial) -> Path:
        """Sum up what was begun, give it its name and make it the newest."""
        target = self.root / _name(partial.step)
        with self._undone_when_refused(partial):
            _write_json(partial.path / STEP_MANIFEST, file_manifest(partial.path))
            _sync_tree(partial.path)
            self._set_aside(target)
            os.replace(partial.path, target)
            self._point_latest_at(target)
        self._prune()
        return target

    @staticmethod
    def abandon(partial: Partial) -> None:
        """Remove what was begun."""
        shutil.rmtree(partial.path, ignore_errors=True)

    @contextmanager
    def _undone_when_refused(self, partial: Partial) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.abandon(partial)
            raise CheckpointError(
                f"checkpoint of step {partial.step} could not be written: {error.strerror or error}",
                where=str(self.root / _name(partial.step)),
                why="the disk refused the write; the older checkpoints are untouched",
                fix=f"free space, then go on from {self._latest_name() or 'the start'}: miles runs resume "
                f"{self.root.parent}",
            ) from error

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None before the first."""
        name = self._latest_name()
        return self.root / name if name else None

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint."""
        name = self._latest_name()
        return int(name.removeprefix("step-")) if name else None

    def at_step(self, step: int) -> Path:
        """The checkpoint of one step. Raises: CheckpointError when there is none."""
        path = self.root / _name(step)
        if not path.is_dir():
            kept = self.steps()
            raise CheckpointError(
                f"no checkpoint of step {step}",
                where=str(self.root),
                why=f"kept: {', '.join(map(str, kept)) or 'none'}",
                fix=f"name one of those, as --from-step {kept[-1]}" if kept else "leave --from-step out",
            )
        return path

    def rewind(self, step: int) -> None:
        """Make the checkpoint of `step` the newest; later ones are set aside, not deleted."""
        for later in [s for s in self.steps() if s > step]:
            self._set_aside(self.root / _name(later))
        self._point_latest_at(self.root / _name(step))

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        return sorted(int(p.name.removeprefix("step-")) for p in self.root.glob("step-*") if p.is_dir())

    @staticmethod
    def load_state(path: Path) -> LoopState:
        """Verify every file of a checkpoint against its manifest and read the loop state.

        Raises: CheckpointError naming the first file that is missing, truncated or altered.
        """
        manifest = _read_json(path / STEP_MANIFEST)
        for name, expected in manifest.items():
            _verify(path / name, expected["bytes"], expected["crc32"])
        return LoopState(**_read_json(path / "loop_state.json"))

    def _latest_name(self) -> str | None:
        pointer = self.root / "LATEST"
        if pointer.is_file():
            return pointer.read_text().strip() or None
        steps = self.steps()
        return _name(steps[-1]) if steps else None

    def _point_latest_at(self, target: Path) -> None:
        pointer = self.root / ".LATEST.partial"
        pointer.write_text(target.name + "\n")
        _sync(pointer)
        os.replace(pointer, self.root / "LATEST")
        _sync(self.root)

    def _set_aside(self, target: Path) -> None:
        """A checkpoint that a resume from an earlier step replaces is kept, not overwritten."""
        if not target.exists():
            return
        attic = self.root / "superseded"
        attic.mkdir(exist_ok=True)
        number = sum(1 for p in attic.glob(f"{target.name}-*"))
        os.replace(target, attic / f"{target.name}-{number}")

    def _prune(self) -> None:
        if self.keep is None:
            return
        latest = self._latest_name()
        for step in self.steps()[: -self.keep]:
            name = _name(step)
            if name != latest:
                shutil.rmtree(self.root / name)


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _verify(path: Path, size: int, crc32: int) -> None:
    """Raises: CheckpointError when `path` is not the file that was written."""
    if not path.is_file():
        raise CheckpointError("file of the checkpoint is missing", where=str(path), fix=TAKE_OLDER)
    if path.stat().st_size != size:
        raise CheckpointError(
            f"file of the checkpoint is truncated: {path.stat().st_size} of {size} bytes",
            where=str(path),
            fix=TAKE_OLDER,
        )
    if crc32_of(path) != crc32:
        raise CheckpointError(
            "file of the checkpoint was altered: checksum differs", where=str(path), fix=TAKE_OLDER
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError("file of the checkpoint is missing", where=str(path), fix=TAKE_OLDER) from None
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"file of the checkpoint is not JSON: {error}", where=str(path), fix=TAKE_OLDER
        ) from None
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def _sync_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
