"""What every trainer does with a rollout batch, whatever library its model is made of."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles.arch.spec import ArchSpec
from miles.data.batch import TrainBatch
from miles.errors import RunError
from miles.training.batch_advantages import with_advantages
from miles.training.critic_course import CriticModel
from miles.training.native.batch_checks import require_rollout_log_probs, validate_batch
from miles.training.native.measurements import DISPATCHED, PassMeasurements
from miles.training.native.micro_batches import split_optimizer_steps
from miles.training.native.ranks import Ranks
from miles.training.native.state import TrainerState
from miles.training.native.update import Update
from miles.training.settings import TrainerSettings
from miles.training.teacher import Teacher
from miles.training.trainer import LogProbs, ModelRole, TrainResult
from miles.weights.hf import TORCH_DTYPES, read_hf, write_hf
from miles.weights.native_map import without_spare_mtp

REFERENCE_DIR = "reference"
"""A reference that is an earlier policy, in a checkpoint."""


class RolloutTrainer(ABC):
    """Fills in what the loss needs, cuts the batch into optimizer steps and sums up what they report."""

    spec: ArchSpec
    settings: TrainerSettings
    state: TrainerState
    ranks: Ranks
    dtype: torch.dtype
    source_dir: Path | None
    teacher: Teacher | None = None
    critic: CriticModel | None = None
    _reference_is_own: bool = False
    """Whether the reference is the policy of an earlier step, and belongs in a checkpoint."""

    @abstractmethod
    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], model: ModelRole = "policy") -> None:
        """See `training.trainer.Trainer`."""

    @abstractmethod
    def named_weights(self, everywhere: bool = False) -> Iterator[tuple[str, Tensor]]:
        """See `training.trainer.Trainer`; `everywhere`: on all ranks."""

    @abstractmethod
    def _reference_weights(self) -> tuple[Iterator[tuple[str, Tensor]], bool]:
        """As `named_weights`, and whether this rank is given them."""

    @abstractmethod
    def log_probs(self, batch: TrainBatch, model: ModelRole = "policy") -> LogProbs:
        """See `training.trainer.Trainer`."""

    @abstractmethod
    def _update(self, batch: TrainBatch, measurements: PassMeasurements | None) -> Update:
        """One optimizer step on all of `batch`, after which the state counts it."""

    @abstractmethod
    def _before_updates(self, batch: TrainBatch) -> dict[str, float]:
        """Metrics of the weights that the engine sampled with, such as the gap without routing replay."""

    def _after_updates(self) -> dict[str, float]:
        """Metrics that were collected since."""
        return {}

    def _take_events(self) -> tuple[dict[str, Any], ...]:
        """What was found since the last step, beyond the updates' own events."""
        return ()

    @property
    def step(self) -> int:
        """Optimizer steps taken so far, skipped ones included."""
        return self.state.step

    def train_step(self, batch: TrainBatch) -> TrainResult:
        """Train on one rollout batch, in `num_steps_per_rollout` optimizer steps.

        Old and reference log-probs and advantages are taken from the batch where it carries them, and
        computed where the loss needs them. With one optimizer step per rollout the old log-probs are those
        of the training forward itself. While a critic warms up the policy is measured and left as it is.
        """
        validate_batch(batch, self.spec)
        self.ranks.require_same_input(batch, self.state)
        policy = self.state.knobs.apply(self.settings.algorithm.policy)
        if self.settings.algorithm.use_rollout_logprobs or policy.reads_rollout_log_probs:
            require_rollout_log_probs(batch)
        metrics = self._before_updates(batch)
        batch, prepared = self._prepare(batch)
        metrics |= prepared
        measurements = None if "rollout/log_probs" in prepared else PassMeasurements(self.spec)
        updates: list[Update] = []
        stop = False
        for part in split_optimizer_steps(batch, self.settings.num_steps_per_rollout):
            updates.append(self._update(part, None if updates else measurements))
            stop = bool(updates[-1].events) and self.settings.non_finite_policy == "stop"
            if stop:
                break
        if measurements is not None:
            metrics |= measurements.over(self.ranks).metrics()
        metrics |= self._after_updates()
        self._count_rollout()
        return _summarize(metrics, updates, stop, self._take_events())

    def load_critic(self, saved: ArchSpec, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Fill the critic from a checkpoint of the model `saved`, see `CriticCourse.beginning`."""
        assert self.critic is not None, "the settings name no critic"
        self.critic.load_weights(saved, tensors)

    def start_critic(self) -> None:
        """The critic begins as the policy of this moment, with a value head of zeros. Collective."""
        self.load_critic(self.spec, self.named_weights(everywhere=True))

    def update_reference(self) -> None:
        """The policy of this moment becomes the reference. Collective."""
        policy = without_spare_mtp(self.spec, self.spec.policy, self.named_weights(everywhere=True))
        self.load_weights(policy, "reference")
        self._reference_is_own = True

    def _save_reference(self, directory: Path) -> None:
        """Into a checkpoint, where the reference is no checkpoint of its own. Collective."""
        if not self._reference_is_own:
            return
        weights, writes = self._reference_weights()
        try:
            if writes:
                stored = next(name for name, dtype in TORCH_DTYPES.items() if dtype == self.dtype)
                write_hf(directory / REFERENCE_DIR, self.spec.policy, weights, self.source_dir, stored)
        finally:
            deque(weights, maxlen=0)  # the other ranks' gathers are answered whatever happens to the disk

    def _load_reference(self, directory: Path) -> None:
        """The reference of a checkpoint, where it holds one."""
        if (directory / REFERENCE_DIR).is_dir():
            self.load_weights(read_hf(directory / REFERENCE_DIR), "reference")
            self._reference_is_own = True

    def finish_saving(self, *, wait: bool) -> bool:
        """Whether what `save` began is on disk; it is, where `save` itself waits."""
        return True

    def set(self, knob: str, value: float) -> None:
        """Change a live knob (see `training.knobs`) from the next step on."""
        self.state = replace(self.state, knobs=self.state.knobs.changed(knob, value, self.settings))

    def knobs(self) -> dict[str, float]:
        """The knobs in effect."""
        return self.state.knobs.as_dict()

    def _prepare(self, batch: TrainBatch) -> tuple[TrainBatch, dict[str, float]]:
        """Fill in what the loss needs and the batch lacks."""
        algorithm = self.settings.algorithm
        metrics: dict[str, float] = {}
        if algorithm.loss_type == "sft_loss":
            return batch, metrics
        if batch.old_log_probs is None and (self.settings.needs_old_log_probs_pass or self._warms_up):
            batch, more = self._with_log_probs(batch, "policy", "old_log_probs")
            metrics |= more
        if batch.ref_log_probs is None and algorithm.needs_reference:
            batch, more = self._with_log_probs(batch, "reference", "ref_log_probs")
            metrics |= more
        if batch.teacher_log_probs is None and algorithm.opd_kl_coef is not None:
            batch, more = self._with_teacher(batch)
            metrics |= more
        if batch.values is None and algorithm.needs_values:
            batch, more = self._with_values(batch)
            metrics |= more
        if batch.advantages is None:
            batch, more = with_advantages(batch, algorithm)
            metrics |= more
        return batch, metrics

    def _counted(self, update: Update) -> Update:
        """The step that was taken, once the state counts it."""
        state, drafts, critic = self.state, self.state.draft_updates, self.state.critic
        if critic is not None:
            critic = replace(critic, updates=critic.updates + (update.critic_event is None))
        self.state = replace(
            state,
            step=state.step + 1,
            updates=state.updates + update.applied,
            draft_updates=None if drafts is None else drafts + update.draft_applied,
            critic=critic,
        )
        return update

    @property
    def _warms_up(self) -> bool:
        """Whether this rollout trains the critic alone."""
        critic, seen = self.settings.critic, self.state.critic
        return critic is not None and seen is not None and seen.rollouts < critic.num_critic_only_steps

    def _count_rollout(self) -> None:
        critic = self.state.critic
        if critic is not None:
            self.state = replace(self.state, critic=replace(critic, rollouts=critic.rollouts + 1))

    def _over_ranks(self, own_T: np.ndarray, batch: TrainBatch) -> np.ndarray:
        """Row values of all ranks in place of this one's, which are 0 elsewhere; NaN on untrained rows."""
        values_T = self.ranks.sum(torch.from_numpy(own_T)).numpy()
        values_T[batch.loss_mask == 0] = np.nan
        return values_T

    def _pass_metrics(
        self, measurements: PassMeasurements, model: ModelRole, log_probs_T: np.ndarray
    ) -> dict[str, float]:
        """Of a pass that gave log-probs, given them for all rows."""
        if model == "policy":
            return measurements.metrics()
        metrics = {"rollout/ref_log_probs": float(np.nanmean(log_probs_T))}
        agreement = measurements.agreement_metrics()
        if DISPATCHED in agreement:
            metrics["route/ref_dispatched_flip_frac"] = agreement[DISPATCHED]
        return metrics

    def _values(self, batch: TrainBatch) -> np.ndarray:
        """The critic's values float32 [T] of the trained rows, NaN elsewhere."""
        assert self.critic is not None, "the settings name no critic"
        return self._over_ranks(self.critic.values(batch), batch)

    def _with_values(self, batch: TrainBatch) -> tuple[TrainBatch, dict[str, float]]:
        started = time.perf_counter()
        values_T = self._values(batch)
        return batch.with_rows(values=values_T), {"perf/values_time": time.perf_counter() - started}

    def _with_teacher(self, batch: TrainBatch) -> tuple[TrainBatch, dict[str, float]]:
        if self.teacher is None:
            raise RunError("no teacher was loaded", fix="set distillation.opd_teacher_load")
        started = time.perf_counter()
        log_probs = self.teacher.log_probs(batch)
        seconds = time.perf_counter() - started
        return batch.with_rows(teacher_log_probs=log_probs), {"perf/teacher_log_probs_time": seconds}

    def _with_log_probs(
        self, batch: TrainBatch, model: ModelRole, name: str
    ) -> tuple[TrainBatch, dict[str, float]]:
        started = time.perf_counter()
        result = self.log_probs(batch, model)
        timer = "perf/log_probs_time" if model == "policy" else "perf/ref_log_probs_time"
        metrics = result.metrics | {timer: time.perf_counter() - started}
        return batch.with_rows(**{name: result.log_probs}), metrics


def _summarize(
    metrics: dict[str, float], updates: list[Update], stop: bool, events: tuple[dict[str, Any], ...]
) -> TrainResult:
    """Means over the optimizer steps of what every one of them reported, next to what was measured once."""
    steps = tuple(update.metrics for update in updates)
    means = {
        name: float(np.mean([step[name] for step in steps]))
        for name in steps[0]
        if all(name in step for step in steps)
    }
    return TrainResult(
        metrics=metrics | means,
        optimizer_steps=steps,
        events=(*events, *(event for update in updates for event in update.events)),
        stop=stop,
    )
