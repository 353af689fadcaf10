"""One rank of the two-rank tests: a process that joins the other one and runs cases until its pipe closes.

usage: rank_worker.py FD RANK SIZE, where FD is a pipe: (case, arguments) in, ("ok", result) or (error class,
message) out. Rank 0 first sends the port of its store; another rank first receives it.
"""

from __future__ import annotations

import os
import pickle
import sys
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from miles.arch import ArchSpec
from miles.data.batch import TrainBatch
from miles.errors import MilesError
from miles.training.native.process_group import LOOPBACK, DataParallel, connect_store, join, open_store
from miles.training.native.trainer import NativeTrainer
from miles.training.settings import TrainerSettings
from miles.training.trainer import TrainResult

Weights = dict[str, torch.Tensor]


def make(
    parallel: DataParallel | None,
    spec: ArchSpec,
    settings: TrainerSettings,
    dtype: str = "float32",
    reference_seed: int | None = None,
    load: Path | None = None,
    teacher: ArchSpec | None = None,
) -> NativeTrainer:
    trainer = NativeTrainer(spec, settings, dtype=getattr(torch, dtype), parallel=parallel)
    trainer.init_weights(0)
    if settings.critic is not None:
        trainer.start_critic()
    if reference_seed is not None:
        other = NativeTrainer(spec, settings, dtype=getattr(torch, dtype))
        other.init_weights(reference_seed)
        trainer.load_weights(other.named_weights(), "reference")
    if teacher is not None:
        model = NativeTrainer(teacher, settings)
        model.init_weights(9)
        trainer.load_teacher(teacher, model.named_weights())
    if load is not None:
        trainer.load(load)
    return trainer


def weights(trainer: NativeTrainer, everywhere: bool = True) -> Weights:
    return {name: tensor.clone() for name, tensor in trainer.named_weights(everywhere)}


def train(
    parallel: DataParallel | None,
    batches: list[TrainBatch],
    save: Path | None = None,
    knobs: dict[str, float] | None = None,
    **how: Any,
) -> tuple[list[TrainResult], Weights]:
    """Results of training on `batches`, and the weights afterwards. `knobs` are set before the last batch."""
    trainer = make(parallel, **how)
    results = []
    for index, batch in enumerate(batches):
        if index == len(batches) - 1:
            for name, value in (knobs or {}).items():
                trainer.set(name, value)
        results.append(trainer.train_step(batch))
    if save is not None:
        trainer.save(save)
    return results, weights(trainer)


def log_probs(parallel: DataParallel | None, batch: TrainBatch, **how: Any) -> Any:
    return make(parallel, **how).log_probs(batch)


def load_and_save(parallel: DataParallel | None, load: Path, save: Path, **how: Any) -> None:
    make(parallel, load=load, **how).save(save)


def refused_save(parallel: DataParallel, missing: Path, batch: TrainBatch, **how: Any) -> tuple[str, float]:
    """What a save into a directory that does not exist raises on this rank, and the next step's loss."""
    trainer = make(parallel, **how)
    try:
        trainer.save(missing)
        raised = "nothing"
    except (MilesError, OSError) as error:
        raised = type(error).__name__
    return raised, trainer.train_step(batch).metrics["train/loss"]


def elements_held(parallel: DataParallel, **how: Any) -> tuple[int, int, int]:
    """Elements of weights and of one moment in this process, and weights yielded without asking."""
    trainer = make(parallel, **how)
    held = sum(p.to_local().numel() for p in trainer.optimizer.parameters.values())
    moments = sum(m.to_local().numel() for m in trainer.optimizer.moments("exp_avg").values())
    return held, moments, len(weights(trainer, everywhere=False))


def other_input(parallel: DataParallel, batch: TrainBatch, kind: str, **how: Any) -> None:
    """Rank 1 is given something else than rank 0."""
    trainer = make(parallel, **how)
    if parallel.rank == 1 and kind == "reward":
        batch = replace(batch, rewards=batch.rewards[::-1].copy())
    if parallel.rank == 1 and kind == "knob":
        trainer.set("lr", 0.5)
    trainer.train_step(batch)


def listening_addresses(parallel: DataParallel) -> list[str]:
    """Hexadecimal addresses of the listening sockets of this process (Linux)."""
    sockets = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_link(fd)}
    rows = [line.split() for kind in ("tcp", "tcp6") for line in _table(kind)]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]


def _is_link(fd: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{fd}")


def _table(kind: str) -> list[str]:
    return Path(f"/proc/self/net/{kind}").read_text().splitlines()[1:]


CASES = {
    case.__name__: case
    for case in (
        train, log_probs, load_and_save, refused_save, elements_held, other_input, listening_addresses
    )
}  # fmt: skip


def meet(pipe: Connection, rank: int, size: int) -> DataParallel:
    if rank == 0:
        store = open_store()
        pipe.send(store.port)
    else:
        store = connect_store(LOOPBACK, pipe.recv())
    return join(store, rank, size, timeout_s=600)


def main() -> None:
    torch.set_num_threads(1)
    pipe, rank, size = Connection(int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    parallel = meet(pipe, rank, size)
    while True:
        try:
            case, alone, arguments = pipe.recv()
        except EOFError:
            break
        try:
            answer = ("ok", CASES[case](None if alone else parallel, **arguments))
        except MilesError as error:
            answer = (type(error).__name__, str(error))
        # A connection's own `send` would share tensors through a server of this process.
        pipe.send_bytes(pickle.dumps(answer))
    parallel.leave()


if __name__ == "__main__":
    main()
