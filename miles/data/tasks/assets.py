"""The files of a built-in task, written atomically and checked on reuse."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from miles.errors import DataError
from miles.scratch import scratch_directory, sweep

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class TaskAssets:
    """Where the files of one built-in task lie."""

    root: Path

    @property
    def checkpoint(self) -> Path:
        """Directory with tokenizer.json, tokenizer_config.json and config.json; it holds no weights."""
        return self.root / "checkpoint"

    @property
    def train(self) -> Path:
        """JSONL of `input` and `label`: the prompts of the RL run."""
        return self.root / "train.jsonl"

    @property
    def test(self) -> Path:
        """JSONL of `input` and `label`: held out from training and from the demonstrations."""
        return self.root / "test.jsonl"

    @property
    def demonstrations(self) -> Path:
        """JSONL of `prompt` and `response`: what the warm start imitates."""
        return self.root / "demonstrations.jsonl"


def write_once(root: Path, write: Callable[[TaskAssets], None]) -> TaskAssets:
    """Run `write` in a scratch directory beside `root`, rename it into place; reuse `root` when it exists.

    Two processes may do this at once: the first rename wins. Raises DataError when a file of an existing
    `root` does not match its manifest.
    """
    sweep(root.parent, f".{root.name}-")
    if root.exists():
        return _checked(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    try:
        with scratch_directory(root.parent, f".{root.name}-") as scratch:
            write(TaskAssets(scratch))
            manifest = {name: _digest(scratch / name) for name in _file_names(scratch)}
            (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
            os.rename(scratch, root)
    except OSError:
        # A directory cannot be renamed onto one that another process has just filled: that one serves as
        # well.
        if not (root / MANIFEST).exists():
            raise
        return _checked(root)
    return TaskAssets(root)


def _file_names(root: Path) -> list[str]:
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _checked(root: Path) -> TaskAssets:
    manifest_path = root / MANIFEST
    if not manifest_path.exists():
        raise DataError("a built-in task without its manifest", where=str(root), fix=f"remove {root}")
    manifest = json.loads(manifest_path.read_text())
    for name, digest in manifest.items():
        path = root / name
        if not path.exists() or _digest(path) != digest:
            raise DataError(
                "a file of a built-in task is missing or was changed",
                where=str(path),
                why="runs that share a recipe and a seed must share their data",
                fix=f"remove {root}; it is made again on the next run",
            )
    return TaskAssets(root)
