"""Online training of the MTP layers: they learn to follow the policy, which gets no gradient from it.

`draft_course` says what is taught. Trunk, embedding and head are detached. Norm and clipping are the draft's
own.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from miles.data.batch import TrainBatch
from miles.models.decoder import Decoder
from miles.models.logprob import best_tokens, token_log_probs
from miles.models.mtp import MtpDraft
from miles.models.unrolled_attention import UnrolledAttention
from miles.training.draft_course import DraftCourse, DraftUpdate
from miles.training.native.micro_batches import MicroBatch
from miles.training.native.optimizer import MasterAdamW


class DraftTraining:
    """The MTP layers and their optimizer. `depths`: tokens ahead that are taught, at least one per layer;
    `loss_scale` weighs their loss.
    """

    def __init__(self, draft: MtpDraft, optimizer: MasterAdamW, depths: int, loss_scale: float) -> None:
        self.draft, self.optimizer = draft, optimizer
        self._course = DraftCourse(max(depths, draft.num_layers), loss_scale)

    def begin(self, batch: TrainBatch, indices_N: np.ndarray) -> DraftUpdate | None:
        """A step over these sequences of the batch; None where they have nothing to teach."""
        return self._course.begin(batch, indices_N)

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
        cu_seqlens = micro_batch.cu_seqlens_N1
        taught = self._course.lessons(batch, micro_batch)
        features = self.draft.chain(
            micro_batch.unshared(hidden_TD),
            *self._course.chain_inputs(taught, batch, micro_batch, hidden_TD.device),
            UnrolledAttention(self.draft.numerics.packed_attention(cu_seqlens), cu_seqlens),
            decoder,
        )

        def cross_entropy(rows_RD: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
            return self._cross_entropy(rows_RD, targets_R, decoder)

        self._course.backward(update, taught, features, cross_entropy, micro_batch.padding)
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
