"""One process of a world: runs cases over gloo on loopback and writes what came out.

usage: rank_worker.py RANK SIZE DIRECTORY. DIRECTORY/cases.pickle holds {name: (function of this module,
arguments)}; results go to DIRECTORY/RANK.pickle as {name: result}, an error as (class name, message).
"""

from __future__ import annotations

import pickle
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from miles.arch import ArchSpec
from miles.data.batch import TrainBatch
from miles.training.megatron.layout import MegatronLayout
from miles.training.megatron.trainer import MegatronTrainer
from miles.training.native.process_group import LOOPBACK, DataParallel, connect_store, join, open_store
from miles.training.settings import TrainerSettings

Weights = dict[str, torch.Tensor]
NAMES = (
    "train/loss",
    "train/grad_norm",
    "route/flip_frac",
    "route/dispatched_flip_frac",
    "rollout/log_probs",
    "train/mtp_loss",
    "train/mtp_grad_norm",
    "train/mtp_accuracy/depth_1",
    "precision/weight_error",
    "rollout/values",
    "train/value_loss",
    "train/value_clipfrac",
    "train/explained_variance",
    "train/critic_grad_norm",
)


def make(
    parallel: DataParallel | None,
    spec: ArchSpec,
    settings: TrainerSettings,
    layout: MegatronLayout,
    load: Path | None = None,
    **saving: bool,
) -> MegatronTrainer:
    trainer = MegatronTrainer(spec, settings, layout, parallel=parallel, **saving)
    if load is None:
        trainer.init_weights(0)
        if settings.critic is not None:
            trainer.start_critic()
    else:
        trainer.load(load)
    return trainer


def weights(trainer: MegatronTrainer) -> Weights:
    """Of the policy, and with `critic.` before their names of the critic."""
    found = {name: tensor.clone() for name, tensor in trainer.named_weights(everywhere=True)}
    if trainer.critic is not None:
        trainer.critic.optimizer.settle()
        own = trainer.critic.tensors.published(trainer.dtype, everywhere=True)
        found |= {f"critic.{name}": tensor.clone() for name, tensor in own}
    return found


def second_moments(trainer: MegatronTrainer) -> Weights:
    """As `weights`."""
    found = {}
    for prefix, saved in (("", trainer._on_disk), ("critic.", trainer._critic_on_disk)):
        if saved is not None:
            of, shared = saved.optimizer_state()["exp_avg_sq"], saved.optimizer.shares
            moments = saved.trained.published(torch.float32, of, everywhere=True, shared=shared)
            found |= {f"{prefix}{name}": tensor.clone() for name, tensor in moments}
    return found


def train(
    parallel: DataParallel | None,
    batches: list[TrainBatch],
    save: Path | None = None,
    then: list[TrainBatch] = [],  # noqa: B006
    **how: Any,
) -> tuple[list[dict[str, float]], Weights]:
    """Metrics of training on `batches`, and the weights afterwards; saved to `save`, and then on `then`."""
    trainer = make(parallel, **how)
    results = [trainer.train_step(batch).metrics for batch in batches]
    if save is not None:
        trainer.save(save)
        if parallel is not None:
            torch.distributed.barrier()
    results += [trainer.train_step(batch).metrics for batch in then]
    assert trainer.finish_saving(wait=True)
    return [{name: row[name] for name in NAMES if name in row} for row in results], weights(trainer)


def go_on(
    parallel: DataParallel, batches: list[TrainBatch], **how: Any
) -> tuple[list[dict[str, float]], Weights, Weights]:
    """Weights and second moments as they lie after loading; first, the metrics of training on from there."""
    trainer = make(parallel, **how)
    loaded = weights(trainer), second_moments(trainer)
    results = [trainer.train_step(batch).metrics for batch in batches]
    return [{name: row[name] for name in NAMES if name in row} for row in results], *loaded


def drift(parallel: DataParallel, batches: list[TrainBatch], **how: Any) -> float:
    """How far this rank's copy of what all ranks should hold alike is from the first rank's."""
    trainer = make(parallel, **how)
    for batch in batches:
        trainer.train_step(batch)
    (chunk,) = trainer._chunks.bare
    own = torch.cat([p.detach().flatten() for name, p in chunk.named_parameters() if ".experts." in name])
    first = own.clone()
    torch.distributed.broadcast(first, 0)
    return float((own - first).abs().max())


def interleaved(
    parallel: DataParallel | None, batches: list[TrainBatch], overlap: bool, **how: Any
) -> list[dict[str, float]]:
    """Metrics of training on sequences of one length, where exchanges between stages overlap, or do not."""
    trainer = make(parallel, **how)
    for chunk in trainer._chunks.wrapped:
        chunk.config.overlap_p2p_comm, chunk.config.batch_p2p_comm = overlap, not overlap
        chunk.config.variable_seq_lengths = False
    results = [trainer.train_step(batch).metrics for batch in batches]
    return [{name: row[name] for name in NAMES if name in row} for row in results]


def main() -> None:
    rank, size, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    parallel = None
    if size > 1:
        parallel = join(_store(rank, directory), rank, size, timeout_s=600)
    results: dict[str, Any] = {}
    for name, (function, arguments) in pickle.loads((directory / "cases.pickle").read_bytes()).items():
        try:
            results[name] = globals()[function](parallel, **arguments)
        except Exception as error:
            results[name] = (type(error).__name__, str(error))
            break  # the ranks may no longer agree where they are
    (directory / f"{rank}.pickle").write_bytes(pickle.dumps(results))


def _store(rank: int, directory: Path) -> Any:
    port = directory / "port"
    if rank == 0:
        store = open_store()
        (directory / "port.new").write_text(str(store.port))
        (directory / "port.new").rename(port)
        return store
    while not port.exists():
        time.sleep(0.02)
    return connect_store(LOOPBACK, int(port.read_text()))


if __name__ == "__main__":
    main()
