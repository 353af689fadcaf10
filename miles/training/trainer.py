"""The protocol that every trainer obeys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

from miles.data.batch import TrainBatch

ModelRole = Literal["policy", "reference"]


@dataclass(frozen=True)
class LogProbs:
    """Log-probs of a batch's targets under one model.

    `log_probs` and `entropy` (None when not asked for) are float32 [T], NaN on untrained rows. `metrics`
    holds the agreement of the model's own routing with the batch's routes (`route/...`), absent without
    routes.
    """

    log_probs: np.ndarray
    entropy: np.ndarray | None
    replayed: bool
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainResult:
    """What one rollout batch did to the model.

    `metrics` carries full names (`train/loss`, `route/flip_frac`, ...): means over the optimizer steps of the
    batch, which `optimizer_steps` holds one by one. `events` are dicts with a `kind`, ready for the record;
    `stop` is set when the non-finite policy asks the run to end.
    """

    metrics: dict[str, float]
    optimizer_steps: tuple[dict[str, float], ...]
    events: tuple[dict[str, Any], ...] = ()
    stop: bool = False


class Trainer(Protocol):
    """A model in training. Weights cross this boundary under published names only."""

    @property
    def step(self) -> int:
        """Optimizer steps taken so far, skipped ones included."""

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], model: ModelRole = "policy") -> None:
        """Replace all weights of the policy or of the reference. Raises CheckpointError."""

    def log_probs(self, batch: TrainBatch, model: ModelRole = "policy") -> LogProbs:
        """Log-probs and entropies of the batch's targets, without gradient."""

    def train_step(self, batch: TrainBatch) -> TrainResult:
        """Train on one rollout batch, in `num_steps_per_rollout` optimizer steps."""

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights under published names; views of the live parameters where possible."""

    def update_reference(self) -> None:
        """The policy of this moment becomes the reference."""

    def save(self, directory: Path, *, optimizer: bool = True) -> None:
        """Write weights, optimizer moments, schedule and knobs into an existing directory."""

    def finish_saving(self, *, wait: bool) -> bool:
        """Whether what `save` began is on disk; `wait` until it is. Raises CheckpointError."""

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote, bit for bit. Raises CheckpointError."""

    def set(self, knob: str, value: float) -> None:
        """Change a live knob from the next step on. Raises RunError for one that cannot be changed."""

    def knobs(self) -> dict[str, float]:
        """The knobs in effect."""
