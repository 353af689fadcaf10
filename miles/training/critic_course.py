"""What a critic starts from, what it is taught and how its step ends, whichever trainer holds it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from miles.algorithms.losses import LossOutput
from miles.algorithms.value_loss import ValueRows, value_loss
from miles.arch.spec import ArchSpec
from miles.data.batch import TrainBatch
from miles.training.native.micro_batches import MicroBatch
from miles.training.native.non_finite import NamedTensors, find_non_finite
from miles.training.native.schedule import learning_rate
from miles.training.native.state import TrainerState
from miles.training.native.step_batch import step_weights
from miles.training.settings import CriticSettings, TrainerSettings
from miles.weights.native_map import without_spare_mtp


@dataclass(frozen=True)
class CriticUpdate:
    """The outcome of one optimizer step; `event` says why it was skipped, None when it was applied."""

    metrics: dict[str, float]
    event: dict[str, Any] | None = None


class CriticModel(Protocol):
    """The critic of a trainer. On several ranks it is cut like the policy, and every method is collective."""

    def load_weights(self, saved: ArchSpec, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Start from the published tensors of a model `saved`, see `CriticCourse.beginning`."""

    def values(self, batch: TrainBatch) -> np.ndarray:
        """Float32 [T] of the trained rows in this rank's share, 0 elsewhere."""

    def update(self, batch: TrainBatch, state: TrainerState) -> CriticUpdate:
        """One optimizer step towards the returns of all sequences of the batch, each on one of the ranks.

        Loss and norm are those of the whole step on every rank, so all of them apply it or none does.
        """


class CriticOptimizer(Protocol):
    """What is asked of a critic's optimizer once all gradients are in it."""

    def apply(self, learning_rate: float, norm: float) -> None: ...


class CriticCourse:
    """`spec`, `settings`: the policy's, of which `spec` and `settings` of the critic are made."""

    def __init__(self, spec: ArchSpec, settings: TrainerSettings, own: CriticSettings) -> None:
        self.spec, self._own = spec.critic, own
        # Balancing and rounding are the policy's: what an engine never serves has no format to keep to.
        self.settings = replace(settings, moe_aux_loss_coeff=0.0, precision=None)

    def beginning(
        self, saved: ArchSpec, tensors: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor]]:
        """The critic's published tensors from those of a model `saved`: a critic, or a language model, whose
        head is left out. Where no value head comes it is of zeros: the first values are all 0, and the first
        advantages are returns.
        """
        has_head = False
        for name, tensor in without_spare_mtp(saved, self.spec, tensors):
            has_head |= name == self.spec.head_name
            yield name, tensor
        if not has_head:
            yield self.spec.head_name, torch.zeros(self.spec.head_rows, self.spec.hidden_size)

    def weights(self, batch: TrainBatch) -> np.ndarray:
        """Reduction weights float32 [T] over the whole step."""
        return step_weights(batch, self.settings.algorithm)

    def loss(
        self, values_R: Tensor, micro_batch: MicroBatch, batch: TrainBatch, weights_T: np.ndarray
    ) -> LossOutput:
        """Of the trained rows of one micro-batch; 0, with gradients of 0, where it is padding."""
        old_R, returns_R, weights_R = (
            micro_batch.trained_values(array) for array in (batch.values, batch.returns, weights_T)
        )
        assert old_R is not None and returns_R is not None and weights_R is not None
        if micro_batch.padding:
            weights_R = torch.zeros_like(weights_R)
        return value_loss(ValueRows(values_R, old_R, returns_R, weights_R), self._own.value_clip)

    def finish(
        self,
        metrics: dict[str, float],
        batch: TrainBatch,
        state: TrainerState,
        optimizer: CriticOptimizer,
        weights: NamedTensors,
        gradients: NamedTensors,
    ) -> CriticUpdate:
        """Take the step, or explain why not. `metrics`: loss and gradient norm of the whole step, to which
        its learning rate is added; `weights`, `gradients`: published, read only to explain.
        """
        assert state.critic is not None and state.knobs.critic_lr is not None
        rate = learning_rate(state.critic.updates, state.knobs.critic_lr, self._own.schedule)
        metrics["train/critic_lr"] = rate
        loss, norm = metrics["train/value_loss"], metrics["train/critic_grad_norm"]
        if math.isfinite(norm) and math.isfinite(loss):
            optimizer.apply(rate, norm)
            return CriticUpdate(metrics)
        trained_T = batch.loss_mask > 0
        arrays = {"values": batch.values, "returns": batch.returns}
        event = find_non_finite(
            state.step,
            self.settings.non_finite_policy,
            weights=_critics(weights),
            loss_inputs=(
                (name, torch.from_numpy(a[trained_T])) for name, a in arrays.items() if a is not None
            ),
            gradients=_critics(gradients),
            loss=loss,
        )
        metrics["train/critic_non_finite_elements"] = float(event["count"])
        return CriticUpdate(metrics, event)


def _critics(tensors: NamedTensors) -> NamedTensors:
    """Under published names with `critic.` before them, which tells them from the policy's."""
    return ((f"critic.{name}", tensor) for name, tensor in tensors)
