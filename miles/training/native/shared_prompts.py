"""Which rows of a micro-batch are the same computation: the prompt rows of a prompt group.

Samples of a group have the same prompt tokens and, prefilled once by the engine, the same routes there. Their
prompt rows then have the same hidden states, and one pass serves them all; their gradients add up. With short
responses that is most of the work. Legend as in `micro_batches`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from miles.data.batch import TrainBatch
from miles.models.attention import EXPLICIT_MAX_LEN, Attention
from miles.models.decoder import Decoder
from miles.models.numerics import Numerics
from miles.models.segment_attention import SegmentAttention
from miles.training.settings import TrainerSettings


def may_share_prompts(decoder: Decoder, settings: TrainerSettings, batch: TrainBatch) -> bool:
    """A balance loss averages over all rows; exact numerics in torch materialise the scores of shared
    prompts, and have no gradient for it on CUDA; windows, soft caps and sparse attention are computed in
    whole sequences."""
    short = int(batch.lengths.max()) <= EXPLICIT_MAX_LEN
    may = decoder.numerics.shares_long_prompts or (short and decoder.embed.device.type == "cpu")
    return may and settings.moe_aux_loss_coeff == 0 and decoder.spec.has_plain_attention


@dataclass(frozen=True)
class SharedPrompts:
    """The rows that pass the model, prompts first, and where each packed row is found among them.

    `rows_T` int64: rows of the batch. `row_of_packed` int64: for every row of the packed sequences, its place
    in `rows_T`.
    """

    rows_T: np.ndarray
    row_of_packed: np.ndarray
    prompt_cu_seqlens: np.ndarray
    own_cu_seqlens: np.ndarray
    prompt_of_own: np.ndarray

    @property
    def copies_T(self) -> np.ndarray:
        """int64 [T]: how many packed rows each row stands for."""
        return np.bincount(self.row_of_packed, minlength=len(self.rows_T))

    def attention(self, numerics: Numerics, device: torch.device) -> Attention:
        """The attention of this layout."""
        cu_seqlens = np.r_[self.prompt_cu_seqlens, self.own_cu_seqlens[1:] + self.prompt_cu_seqlens[-1]]
        if numerics.takes_segments(
            torch.from_numpy(cu_seqlens).to(device), torch.from_numpy(self.prompt_of_own)
        ):
            return SegmentAttention(cu_seqlens, self.prompt_of_own)
        offsets = (self.prompt_cu_seqlens, self.own_cu_seqlens, self.prompt_of_own)
        return numerics.prefix_attention(*(torch.from_numpy(array).to(device) for array in offsets))


def find_shared_prompts(
    batch: TrainBatch, indices_N: np.ndarray, device: torch.device | None = None
) -> SharedPrompts | None:
    """The shared layout of these sequences; None when nothing is shared, or when, on another device than the
    CPU, they are so long that materialised scores would cost more than the rows saved.
    """
    lengths_N = batch.lengths[indices_N].astype(np.int64)
    if device is not None and device.type != "cpu" and lengths_N.max() > EXPLICIT_MAX_LEN:
        return None
    prompts_N = prompt_rows(batch, indices_N)
    starts_N = batch.cu_seqlens[indices_N].astype(np.int64)
    leader_N = _leaders(batch, indices_N, starts_N, prompts_N)
    own_N = lengths_N - prompts_N
    if (leader_N == np.arange(len(leader_N))).all() or not own_N.any():
        return None
    leads = np.flatnonzero(leader_N == np.arange(len(leader_N)))
    prompt_N = np.searchsorted(leads, leader_N)
    by_prompt = np.argsort(prompt_N, kind="stable")
    prompt_cu, own_cu = _offsets(prompts_N[leads]), _offsets(own_N[by_prompt])
    own_starts_N = np.empty_like(own_N)
    own_starts_N[by_prompt] = own_cu[:-1]
    rows_T = np.concatenate(
        [
            _ranges(starts_N[leads], prompts_N[leads]),
            _ranges((starts_N + prompts_N)[by_prompt], own_N[by_prompt]),
        ]
    )
    # A packed row is a prompt row up to its sequence's prompt length, and one of its own rows from there on.
    sequence = np.repeat(np.arange(len(lengths_N)), lengths_N)
    position = _ranges(np.zeros_like(lengths_N), lengths_N)
    inside = position < prompts_N[sequence]
    in_prompt = prompt_cu[prompt_N[sequence]] + position
    in_own = prompt_cu[-1] + own_starts_N[sequence] + position - prompts_N[sequence]
    continued = by_prompt[own_N[by_prompt] > 0]
    return SharedPrompts(
        rows_T=rows_T,
        row_of_packed=np.where(inside, in_prompt, in_own),
        prompt_cu_seqlens=prompt_cu,
        own_cu_seqlens=_offsets(own_N[continued]),
        prompt_of_own=prompt_N[continued],
    )


def prompt_rows(batch: TrainBatch, indices_N: np.ndarray) -> np.ndarray:
    """int64 [N]: rows of these sequences whose input is a prompt token."""
    lengths_N = batch.lengths[indices_N].astype(np.int64)
    return np.minimum(lengths_N + 1 - batch.response_lengths[indices_N], lengths_N)


def _leaders(
    batch: TrainBatch, indices_N: np.ndarray, starts_N: np.ndarray, prompts_N: np.ndarray
) -> np.ndarray:
    """For each sequence the first one of its group, if it begins alike; else itself."""
    groups_N = batch.group_index[indices_N]
    _, first, inverse = np.unique(groups_N, return_index=True, return_inverse=True)
    leader_N = first[inverse]
    leader_N = np.where(
        (prompts_N == prompts_N[leader_N]) & (groups_N >= 0), leader_N, np.arange(len(groups_N))
    )
    own_rows, leader_rows = _ranges(starts_N, prompts_N), _ranges(starts_N[leader_N], prompts_N)
    same = batch.tokens[own_rows] == batch.tokens[leader_rows]
    if batch.routes is not None:
        same &= (batch.routes[own_rows] == batch.routes[leader_rows]).all((1, 2))
    alike_N = np.logical_and.reduceat(same, _offsets(prompts_N)[:-1])
    return np.where(alike_N, leader_N, np.arange(len(groups_N)))


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """[0, l0, l0 + l1, …]."""
    return np.concatenate([[0], np.cumsum(lengths)])


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, … of every range, one after another."""
    offsets = _offsets(lengths)
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
