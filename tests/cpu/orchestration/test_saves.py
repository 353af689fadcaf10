"""Checkpoints written beside the steps: the one before stays the newest until the new one is whole."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import pytest

from miles.errors import CheckpointError
from miles.orchestration.checkpoints import CheckpointStore, LoopState
from miles.orchestration.saves import Saves


@dataclass
class SlowTrainer:
    """Its files are whole when `done` says so, or when it is waited for."""

    done: bool = False
    breaks: bool = False
    file: Path | None = None

    async def write(self, directory: Path) -> None:
        self.file = directory / "weights"
        self.done = False

    async def saved(self, *, wait: bool) -> bool:
        if self.breaks:
            raise CheckpointError("no space left")
        self.done |= wait
        if self.done and self.file is not None:
            self.file.write_bytes(b"whole")
        return self.done


async def until_complete(saves: Saves) -> object:
    """Ask at one step boundary after another."""
    while (saved := await saves.settled(wait=False)) is None:
        await asyncio.sleep(0.001)
    return saved


def test_a_checkpoint_counts_only_once_it_is_whole(tmp_path: Path) -> None:
    trainer, store = SlowTrainer(), CheckpointStore(tmp_path)

    async def run() -> None:
        saves = Saves(store, trainer, beside=True)
        assert await saves.save(LoopState(step=1), trainer.write) is None
        assert saves.has(1) and store.latest() is None
        assert await saves.settled(wait=False) is None
        trainer.done = True
        saved = await until_complete(saves)
        assert saved.path == store.latest() and saved.step == 1
        assert saved.blocked > 0 and saved.background > 0
        await saves.save(LoopState(step=2), trainer.write)
        assert saves.has(2) and store.latest_step() == 1
        waited = await saves.settled(wait=True)
        assert waited.step == store.latest_step() == 2
        assert await saves.settled(wait=True) is None

    asyncio.run(run())
    assert store.load_state(store.at_step(2)).step == 2
    assert (store.at_step(2) / "weights").read_bytes() == b"whole"


def test_a_run_that_dies_meanwhile_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    trainer, store = SlowTrainer(), CheckpointStore(tmp_path)

    async def dies() -> None:
        await Saves(store, trainer, beside=False).save(LoopState(step=1), trainer.write)
        await Saves(store, trainer, beside=True).save(LoopState(step=2), trainer.write)

    asyncio.run(dies())
    survivor = CheckpointStore(tmp_path)
    assert survivor.latest_step() == 1 and survivor.steps() == [1]
    assert survivor.load_state(survivor.at_step(1)).step == 1
    (left,) = tmp_path.glob(".partial-*")
    asyncio.run(Saves(survivor, trainer, beside=False).save(LoopState(step=2), trainer.write))
    assert survivor.latest_step() == 2 and not left.exists()


def test_a_writer_that_fails_is_told_and_its_files_are_removed(tmp_path: Path) -> None:
    trainer, store = SlowTrainer(breaks=True), CheckpointStore(tmp_path)

    async def run() -> None:
        saves = Saves(store, trainer, beside=True)
        await saves.save(LoopState(step=1), trainer.write)
        with pytest.raises(CheckpointError, match="no space left"):
            await saves.settled(wait=False)
        assert await saves.settled(wait=True) is None

    asyncio.run(run())
    assert store.latest() is None and not list(tmp_path.glob(".partial-*"))
