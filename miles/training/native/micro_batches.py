"""A rollout batch cut into optimizer steps, and a step cut into micro-batches of tensors.

Legend: T rows of a micro-batch, R of them trained on (mask not 0), N sequences. Only trained rows pass the
head, so everything the loss reads lives on R rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from miles.algorithms.sequences import Sequences
from miles.data.batch import TrainBatch
from miles.data.packing import fixed_micro_batches, group_micro_batches, micro_batches
from miles.errors import DataError
from miles.training.batch_advantages import distinct_rollouts
from miles.training.native.ranks import OneRank, Ranks
from miles.training.native.shared_prompts import SharedPrompts, find_shared_prompts, prompt_rows
from miles.training.native.shares import share_out
from miles.training.settings import TrainerSettings


@dataclass(frozen=True)
class MicroBatch:
    """What one forward reads. `rows_T` are its rows in the batch it was cut from, `packed_rows` those of its
    sequences one after another; they differ where a prompt is `shared`.

    `trained_R` are the places among the T rows whose hidden states predict the trained rows, `trained_rows`
    (int64 [R]) the places of the trained rows in the batch: of a `shared` prompt the first response tokens of
    all its samples are predicted from one row.

    `padding`: another rank has one micro-batch more; this one runs so that their collectives match, and
    counts for nothing.
    """

    rows_T: np.ndarray
    packed_rows: np.ndarray
    tokens_T: Tensor
    positions_T: Tensor
    cu_seqlens_N1: Tensor
    shared: SharedPrompts | None
    routes_TLK: Tensor | None
    trained_R: Tensor
    trained_rows: np.ndarray
    targets_R: Tensor
    loss_mask_R: Tensor
    sequences_R: Sequences
    padding: bool = False

    @property
    def num_packed_rows(self) -> int:
        """Rows of the batch that this forward stands for: T, unless prompts are shared."""
        return int(self.cu_seqlens_N1[-1])

    @property
    def copies_T(self) -> Tensor | None:
        """int64 [T]: how many rows of the batch each row stands for; None for one each."""
        if self.shared is None:
            return None
        return torch.from_numpy(self.shared.copies_T).to(self.tokens_T.device)

    def unshared(self, x_TD: Tensor) -> Tensor:
        """Values of the T rows for every packed row."""
        if self.shared is None:
            return x_TD
        return x_TD.index_select(0, torch.from_numpy(self.shared.row_of_packed).to(x_TD.device))

    @property
    def num_trained(self) -> int:
        """R."""
        return self.trained_R.numel()

    def trained_values(self, values_T: np.ndarray | None) -> Tensor | None:
        """The trained rows of a row array of the batch, as a tensor [R]."""
        if values_T is None:
            return None
        return torch.from_numpy(values_T[self.trained_rows]).to(self.trained_R.device)


def split_optimizer_steps(batch: TrainBatch, num_steps: int) -> list[TrainBatch]:
    """The batch's rollouts, in order, in `num_steps` nearly equal parts; siblings stay together.

    A batch of fewer rollouts than steps gives one part per rollout.
    """
    if num_steps == 1:
        return [batch]
    rollouts = distinct_rollouts(batch)
    _, first_seen, rollout_of_N = np.unique(rollouts, return_index=True, return_inverse=True)
    order_of_rollout = np.argsort(np.argsort(first_seen))
    num_rollouts = len(first_seen)
    parts = np.array_split(np.arange(num_rollouts), min(num_steps, num_rollouts))
    rank_N = order_of_rollout[rollout_of_N]
    return [batch.select(np.flatnonzero((rank_N >= p[0]) & (rank_N <= p[-1])).tolist()) for p in parts]


def trained_sequences(batch: TrainBatch) -> np.ndarray:
    """int64 indices of the sequences with a trained row. Raises DataError when there is none."""
    found = np.flatnonzero(np.add.reduceat(batch.loss_mask, batch.cu_seqlens[:-1]) > 0)
    if len(found) == 0:
        raise DataError(
            "no token of the step is trained on",
            why=f"the loss mask of all {batch.num_sequences} samples is 0",
            fix="check the loss masks and the filters that remove samples",
        )
    return found


def cut_micro_batches(
    batch: TrainBatch,
    indices_N: np.ndarray,
    settings: TrainerSettings,
    device: torch.device | None = None,
    ranks: Ranks | None = None,
    share_prompts: bool = False,
) -> list[MicroBatch]:
    """This rank's share of the sequences `indices_N` in micro-batches as the settings size them.

    `share_prompts`: see `make_micro_batch`.

    Every rank gets the same number of them: where it has fewer, the shortest sequence is repeated as padding.
    """
    ranks = ranks or OneRank()
    lengths_N = batch.lengths[indices_N]
    shares = [indices_N[share] for share in share_out(lengths_N.tolist(), ranks.size)]
    cuts = [_cut(batch, share, settings, share_prompts) for share in shares]
    own = shares[ranks.rank]
    result = [make_micro_batch(batch, own[cut], device, share_prompts) for cut in cuts[ranks.rank]]
    missing = max(len(cut) for cut in cuts) - len(result)
    if missing:
        shortest = indices_N[[lengths_N.argmin()]]
        result += [replace(make_micro_batch(batch, shortest, device), padding=True)] * missing
    return result


def _cut(
    batch: TrainBatch, indices_N: np.ndarray, settings: TrainerSettings, share_prompts: bool
) -> list[list[int]]:
    max_tokens = settings.max_tokens_per_micro_batch
    if max_tokens is None:
        return fixed_micro_batches(len(indices_N), settings.micro_batch_size or max(1, len(indices_N)))
    lengths = batch.lengths[indices_N].tolist()
    if not share_prompts:
        return micro_batches(lengths, max_tokens)
    groups_N = batch.group_index[indices_N]
    alone_N = -1 - np.arange(len(indices_N))
    groups = np.where(groups_N >= 0, groups_N, alone_N).tolist()
    return group_micro_batches(lengths, prompt_rows(batch, indices_N).tolist(), groups, max_tokens)


def make_micro_batch(
    batch: TrainBatch,
    indices_N: np.ndarray,
    device: torch.device | None = None,
    share_prompts: bool = False,
) -> MicroBatch:
    """The sequences `indices_N` of the batch as tensors on `device`.

    `share_prompts`: a prompt that several sequences begin with passes the model once (`shared_prompts`).
    """
    lengths_N = batch.lengths[indices_N]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths_N)])
    packed = np.arange(cu_seqlens[-1]) + np.repeat(batch.cu_seqlens[indices_N] - cu_seqlens[:-1], lengths_N)
    mask = batch.loss_mask[packed]
    trained = np.flatnonzero(mask)
    trained_before_N1 = np.searchsorted(trained, cu_seqlens)
    shared = find_shared_prompts(batch, indices_N, device) if share_prompts else None
    rows_T = packed if shared is None else shared.rows_T

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return MicroBatch(
        rows_T=rows_T,
        packed_rows=packed,
        tokens_T=tensor(batch.tokens[rows_T]),
        positions_T=tensor(batch.positions[rows_T]),
        cu_seqlens_N1=tensor(cu_seqlens),
        shared=shared,
        routes_TLK=None if batch.routes is None else tensor(batch.routes[rows_T]),
        trained_R=tensor(trained if shared is None else shared.row_of_packed[trained]),
        trained_rows=packed[trained],
        targets_R=tensor(batch.targets[packed[trained]]),
        loss_mask_R=tensor(mask[trained]),
        sequences_R=Sequences(tensor(trained_before_N1)),
    )
