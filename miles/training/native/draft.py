"""Online training of the MTP layers: they learn to follow the policy, which gets no gradient from it.

Depth k at row t reads the trunk at token t and the embedding of token t + 1 + k. It is taught token t + 2 + k
by cross-entropy, where all tokens from t + 1 on are trained on: for depth 0 the loss mask shifted once times
the mask shifted twice. There may be more depths than layers: the last layer then goes on from its own
features, as it does in the engine. Trunk, embedding and head are detached. The loss of a depth is a mean over
the whole optimizer step, so cutting into micro-batches or over ranks does not change it. Norm and clipping
are the draft's own.

Legend: P packed rows of a micro-batch, R of them taught at one depth, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from miles.data.batch import TrainBatch
from miles.models.decoder import Decoder
from miles.models.logprob import best_tokens, token_log_probs
from miles.models.mtp import MtpDraft
from miles.models.unrolled_attention import UnrolledAttention
from miles.training.native.micro_batches import MicroBatch
from miles.training.native.optimizer import MasterAdamW


@dataclass(frozen=True)
class Lesson:
    """Taught at one depth: `tokens` int64 [P] are its input, `targets` [R] the goal at `rows` int64 [R]."""

    tokens: np.ndarray
    rows: np.ndarray
    targets: np.ndarray


def lessons(batch: TrainBatch, packed: np.ndarray, cu_seqlens: np.ndarray, depths: int) -> Iterator[Lesson]:
    """The lessons of depth 0, 1, … for the batch's rows `packed`, sequences cut at `cu_seqlens`."""
    lengths = np.diff(cu_seqlens)
    last = np.repeat(cu_seqlens[1:] - 1, lengths)
    place = np.arange(len(packed))
    mask, targets = batch.loss_mask[packed] > 0, batch.targets[packed]
    taught = mask
    for depth in range(depths):
        here, after = np.minimum(place + depth, last), np.minimum(place + depth + 1, last)
        taught = taught & mask[after] & (place + depth + 1 <= last)
        rows = np.flatnonzero(taught)
        yield Lesson(targets[here], rows, targets[after[rows]])


@dataclass
class DraftUpdate:
    """The draft's side of one optimizer step: what its micro-batches add up to."""

    counts: list[int]
    """Rows taught at each depth, over the whole step and all ranks. The first is not 0."""
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value


class DraftTraining:
    """The MTP layers and their optimizer. `depths`: tokens ahead that are taught, at least one per layer;
    `loss_scale` weighs their loss.
    """

    def __init__(self, draft: MtpDraft, optimizer: MasterAdamW, depths: int, loss_scale: float) -> None:
        self.draft, self.optimizer, self._loss_scale = draft, optimizer, loss_scale
        self._depths = max(depths, draft.num_layers)

    def begin(self, batch: TrainBatch, indices_N: np.ndarray) -> DraftUpdate | None:
        """A step over these sequences of the batch; None where they have nothing to teach."""
        packed, cu_seqlens = _rows_of(batch, indices_N)
        counts = [len(lesson.rows) for lesson in lessons(batch, packed, cu_seqlens, self._depths)]
        return DraftUpdate(counts) if counts[0] else None

    @torch.enable_grad()
    def learn(
        self,
        update: DraftUpdate,
        decoder: Decoder,
        hidden_TD: Tensor,
        micro_batch: MicroBatch,
        batch: TrainBatch,
    ) -> None:
        """Forward and backward of one micro-batch, right after the trunk's forward: its embedding and head
        must still be whole.
        """
        device = hidden_TD.device
        cu_seqlens = micro_batch.cu_seqlens_N1
        taught = list(lessons(batch, micro_batch.packed_rows, cu_seqlens.cpu().numpy(), self._depths))
        features = self.draft.chain(
            micro_batch.unshared(hidden_TD),
            [torch.from_numpy(lesson.tokens).to(device) for lesson in taught],
            [torch.from_numpy(lesson.rows).to(device) for lesson in taught],
            torch.from_numpy(batch.positions[micro_batch.packed_rows]).to(device),
            UnrolledAttention(self.draft.numerics.packed_attention(cu_seqlens), cu_seqlens),
            decoder,
        )
        reached = [depth for depth, count in enumerate(update.counts) if count]
        loss = hidden_TD.new_zeros((), dtype=torch.float32)
        for depth in reached:
            targets = torch.from_numpy(taught[depth].targets).to(device)
            entropy, correct = self._cross_entropy(features[depth], targets, decoder)
            share = (0.0 if micro_batch.padding else 1.0) / update.counts[depth]
            loss = loss + entropy * (share / len(reached))
            update.add({f"mtp_accuracy/depth_{depth + 1}": correct * share})
        update.add({"mtp_loss": loss.detach()})
        (loss * self._loss_scale).backward()
        self.optimizer.accumulate()

    def _cross_entropy(self, rows_RD: Tensor, targets_R: Tensor, decoder: Decoder) -> tuple[Tensor, Tensor]:
        """Summed over rows: nats, with gradient, and how many targets were the first choice."""
        head, linear = decoder.head_weight.detach(), self.draft.numerics.linear
        log_probs_R, _ = token_log_probs(rows_RD, head, targets_R, linear=linear)
        correct_R = best_tokens(rows_RD.detach(), head, linear=linear) == targets_R
        return -log_probs_R.sum(), correct_R.sum().float()

    def finish(self, learning_rate: float, metrics: dict[str, float]) -> bool:
        """Update the draft given the step's `train/mtp_loss`; adds `train/mtp_grad_norm` to `metrics`. False
        when a value is not finite: then nothing is updated, and the gradients are kept to be looked at.
        """
        norm = metrics["train/mtp_grad_norm"] = float(self.optimizer.global_norm())
        if not (math.isfinite(norm) and math.isfinite(metrics["train/mtp_loss"])):
            return False
        self.optimizer.apply(learning_rate, norm)
        return True


def _rows_of(batch: TrainBatch, indices_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of these sequences, one sequence after another, and where each begins [N + 1]."""
    lengths = batch.lengths[indices_N]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    shift = np.repeat(batch.cu_seqlens[indices_N] - cu_seqlens[:-1], lengths)
    return np.arange(cu_seqlens[-1]) + shift, cu_seqlens
