"""From the rewards of a rollout batch to an advantage on every trained row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from miles.algorithms.advantages import AdvantageRows, whiten
from miles.algorithms.distillation import advised, reverse_kl
from miles.algorithms.group_rewards import GroupRewards, choose_baseline, normalize_group_rewards
from miles.algorithms.kl import approximate_kl
from miles.algorithms.sequences import Sequences
from miles.algorithms.value_loss import explained_variance
from miles.data.batch import TrainBatch
from miles.errors import DataError
from miles.training.settings import AlgorithmSettings, CustomAdvantages


def with_advantages(batch: TrainBatch, settings: AlgorithmSettings) -> tuple[TrainBatch, dict[str, float]]:
    """The whole rollout batch with advantages, and metrics of the reward normalisation.

    Runs before the batch is split into optimizer steps: groups and whitening span the rollout batch. With a
    KL penalty in the reward (`kl_coef`), `old_log_probs` and `ref_log_probs` must be there, with an estimator
    that reads a critic, `values`; the batch then gets `returns` too.

    Raises:
        DataError: a sequence without a reward, or without a group where the estimator has a group baseline.
    """
    _require_rewards(batch)
    if settings.custom_advantages is not None:
        return _with_own_advantages(batch, settings, settings.custom_advantages)
    estimator = settings.estimator
    normalized = _normalize(batch, settings)
    mask_T = torch.from_numpy(batch.loss_mask)
    rows = AdvantageRows(
        rewards_N=normalized.values_N,
        loss_mask_T=mask_T,
        sequences=Sequences(torch.from_numpy(batch.cu_seqlens)),
        kl_T=_reward_kl(batch, settings) if estimator.uses_kl_penalty else None,
        kl_coef=settings.kl_coef,
        gamma=settings.gamma,
        values_T=torch.from_numpy(batch.values) if batch.values is not None else None,
        lambd=settings.lambd,
    )
    spread_T = estimator.spread(rows)
    taught, metrics = _lesson(spread_T, rows) if estimator.uses_values else ({}, {})
    advantages_T, advice = _advised(batch, spread_T, settings)
    if settings.normalize_advantages or estimator.needs_whitening:
        advantages_T = whiten(advantages_T, mask_T)
    metrics |= advice | {"rollout/rewards": normalized.values_N.mean().item()}
    if (batch.group_index >= 0).all():
        metrics["train/active_group_fraction"] = 1 - normalized.num_flat_groups / normalized.num_groups
    return batch.with_rows(advantages=advantages_T.numpy(), **taught), metrics


def _lesson(advantages_T: Tensor, rows: AdvantageRows) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """What the critic is taught, A + V on trained rows, and how it stands."""
    assert rows.values_T is not None
    untrained_T = rows.loss_mask_T == 0
    values_T = rows.values_T.masked_fill(untrained_T, 0.0)
    returns_T = advantages_T + values_T
    count = rows.loss_mask_T.count_nonzero().clamp_min(1)
    metrics = {
        "rollout/values": (values_T.sum() / count).item(),
        "rollout/returns": (returns_T.sum() / count).item(),
    }
    explained = explained_variance(values_T, returns_T, rows.loss_mask_T)
    if explained is not None:
        metrics["train/explained_variance"] = explained
    return {"returns": returns_T.numpy()}, metrics


def _with_own_advantages(
    batch: TrainBatch, settings: AlgorithmSettings, advantages_of: CustomAdvantages
) -> tuple[TrainBatch, dict[str, float]]:
    mask_T = torch.from_numpy(batch.loss_mask)
    own_T = torch.from_numpy(advantages_of(batch)).masked_fill(mask_T == 0, 0.0)
    advantages_T, advice = _advised(batch, own_T, settings)
    if settings.normalize_advantages:
        advantages_T = whiten(advantages_T, mask_T)
    return batch.with_rows(advantages=advantages_T.numpy()), advice


def _advised(
    batch: TrainBatch, advantages_T: Tensor, settings: AlgorithmSettings
) -> tuple[Tensor, dict[str, float]]:
    """Advantages with a teacher's advice, where there is one, and how far the student is from it."""
    if settings.opd_kl_coef is None:
        return advantages_T, {}
    student = batch.rollout_log_probs if settings.use_rollout_logprobs else batch.old_log_probs
    assert student is not None and batch.teacher_log_probs is not None, "a teacher's advice needs both"
    mask_T, teacher_T = torch.from_numpy(batch.loss_mask), torch.from_numpy(batch.teacher_log_probs)
    kl_T = reverse_kl(torch.from_numpy(student), teacher_T, mask_T)
    count = mask_T.count_nonzero().clamp_min(1)
    trained_T = teacher_T[mask_T > 0]
    metrics = {
        "rollout/opd_reverse_kl": (kl_T.sum() / count).item(),
        "rollout/teacher_log_probs": trained_T.mean().item(),
    }
    return advised(advantages_T, kl_T, settings.opd_kl_coef), metrics


def distinct_rollouts(batch: TrainBatch) -> np.ndarray:
    """int64 [N] rollout ids, where a sequence without one is a rollout of its own."""
    own = -1 - np.arange(batch.num_sequences, dtype=np.int64)
    return np.where(batch.rollout_ids >= 0, batch.rollout_ids, own)


def _require_rewards(batch: TrainBatch) -> None:
    missing = np.isnan(batch.rewards)
    if missing.any():
        raise DataError(
            f"{int(missing.sum())} of {batch.num_sequences} samples have no reward",
            where=f"samples {batch.sample_index[missing][:8].tolist()}",
            why="a sample without a reward has no advantage",
            fix="leave such samples out of the batch, or mend the reward function",
        )


def _normalize(batch: TrainBatch, settings: AlgorithmSettings) -> GroupRewards:
    baseline = choose_baseline(
        settings.estimator.baseline,
        disable_rewards_normalization=settings.disable_rewards_normalization
        or settings.rewards_are_normalized,
        disable_std_normalization=settings.disable_grpo_std_normalization,
    )
    if baseline != "none" and (batch.group_index < 0).any():
        raise DataError(
            f"samples without a prompt group cannot be normalised for {settings.advantage_estimator}",
            fix="set group_index on every sample, or set algorithm.disable_rewards_normalization",
        )
    return normalize_group_rewards(
        batch.rewards.tolist(), batch.group_index.tolist(), distinct_rollouts(batch).tolist(), baseline
    )


def _reward_kl(batch: TrainBatch, settings: AlgorithmSettings) -> torch.Tensor | None:
    if settings.kl_coef == 0:
        return None
    assert batch.old_log_probs is not None and batch.ref_log_probs is not None, "kl_coef needs both"
    old_T, reference_T = torch.from_numpy(batch.old_log_probs), torch.from_numpy(batch.ref_log_probs)
    return approximate_kl(old_T, reference_T, settings.policy.kl_loss_type)
