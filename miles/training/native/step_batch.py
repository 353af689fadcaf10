"""One optimizer step's batch with what belongs to the step as a whole: weights, counts, flat groups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from miles.algorithms.importance import log_ratio, mean_weight
from miles.algorithms.losses import LossRows, PolicyLossSettings
from miles.algorithms.reductions import token_weights
from miles.algorithms.sequences import Sequences
from miles.data.batch import TrainBatch
from miles.training.batch_advantages import distinct_rollouts
from miles.training.native.forward import ForwardOutput
from miles.training.native.micro_batches import MicroBatch, trained_sequences
from miles.training.settings import AlgorithmSettings


@dataclass(frozen=True)
class StepBatch:
    """`indices_N`: the sequences with a trained row. `weights_T`: reduction weights over the whole step.
    `weight_scale`: what importance weights are divided by.
    """

    batch: TrainBatch
    indices_N: np.ndarray
    weights_T: np.ndarray
    weight_scale: float = 1.0
    pg_weights_T: np.ndarray | None = None
    """Of the policy-gradient loss alone, where a function of the user's gives them."""

    @classmethod
    def of(cls, batch: TrainBatch, settings: AlgorithmSettings, policy: PolicyLossSettings) -> StepBatch:
        """`policy`: the loss under the knobs of this step. Raises DataError when no row is trained on."""
        own_T = None
        if settings.custom_reducer is not None:
            own_T = settings.custom_reducer(batch, len(np.unique(distinct_rollouts(batch)))).numpy()
        indices_N = trained_sequences(batch)
        return cls(batch, indices_N, step_weights(batch, settings), _weight_scale(batch, policy), own_T)

    @property
    def num_rows(self) -> int:
        """Rows that pass the model."""
        return int(self.batch.lengths[self.indices_N].sum())

    def without_advantage(self) -> np.ndarray:
        """bool [N]: sequences of `indices_N` whose advantages are all 0."""
        assert self.batch.advantages is not None
        active_T = (self.batch.advantages != 0) & (self.batch.loss_mask > 0)
        return ~np.logical_or.reduceat(active_T, self.batch.cu_seqlens[:-1])[self.indices_N]

    def loss_rows(
        self, micro_batch: MicroBatch, output: ForwardOutput, use_rollout_logprobs: bool
    ) -> LossRows:
        """What the loss reads for one micro-batch.

        Old log-probs are the batch's, or the engine's when asked for; without either they are the current
        ones.
        """
        batch = self.batch
        rollout_R = micro_batch.trained_values(batch.rollout_log_probs)
        old_R = rollout_R if use_rollout_logprobs else micro_batch.trained_values(batch.old_log_probs)
        weights_R = micro_batch.trained_values(self.weights_T)
        assert weights_R is not None
        return LossRows(
            log_probs_T=output.log_probs_R,
            loss_mask_T=micro_batch.loss_mask_R,
            weights_T=weights_R,
            sequences=micro_batch.sequences_R,
            sequence_weight=1.0 / len(self.indices_N),
            old_log_probs_T=output.log_probs_R.detach() if old_R is None else old_R,
            advantages_T=micro_batch.trained_values(batch.advantages),
            rollout_log_probs_T=rollout_R,
            reference_T=micro_batch.trained_values(batch.ref_log_probs),
            entropy_T=output.entropy_R,
            weight_scale=self.weight_scale,
            pg_weights_T=micro_batch.trained_values(self.pg_weights_T),
        )


def step_weights(batch: TrainBatch, settings: AlgorithmSettings) -> np.ndarray:
    """Reduction weights float32 [T] over the batch of one optimizer step."""
    weights_T = token_weights(
        torch.from_numpy(batch.loss_mask),
        Sequences(torch.from_numpy(batch.cu_seqlens)),
        torch.from_numpy(distinct_rollouts(batch)),
        settings.reduction,
        settings.max_response_len,
    )
    return weights_T.numpy()


def _weight_scale(batch: TrainBatch, policy: PolicyLossSettings) -> float:
    if not policy.normalizes_weights:
        return 1.0
    assert policy.correction is not None and batch.old_log_probs is not None
    ratio_T = log_ratio(torch.from_numpy(batch.old_log_probs), torch.from_numpy(batch.rollout_log_probs))
    sequences = Sequences(torch.from_numpy(batch.cu_seqlens))
    return mean_weight(ratio_T, torch.from_numpy(batch.loss_mask), sequences, policy.correction)
