"""The critic of PPO: a decoder of the policy's form whose head gives one number, trained beside the policy.

It shares no weight with the policy, has an optimizer of its own, routes by itself and rounds nothing. Its
head is published as `score.weight` [1, D], which transformers reads as a sequence classifier of one label.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles.algorithms.losses import LossOutput
from miles.algorithms.value_loss import ValueRows, value_loss
from miles.arch.spec import ArchSpec
from miles.data.batch import TrainBatch
from miles.models.numerics import Numerics
from miles.training.native.forward import token_values
from miles.training.native.micro_batches import MicroBatch, cut_micro_batches, trained_sequences
from miles.training.native.non_finite import NamedTensors, find_non_finite
from miles.training.native.optimizer import MasterAdamW
from miles.training.native.ranks import Ranks
from miles.training.native.schedule import learning_rate
from miles.training.native.shared_prompts import may_share_prompts
from miles.training.native.state import TrainerState
from miles.training.native.step_batch import step_weights
from miles.training.native.tensor_layout import TensorLayout
from miles.training.settings import CriticSettings, TrainerSettings
from miles.weights.native_map import without_spare_mtp


@dataclass(frozen=True)
class CriticUpdate:
    """The outcome of one optimizer step; `event` says why it was skipped, None when it was applied."""

    metrics: dict[str, float]
    event: dict[str, Any] | None = None


class Critic:
    """The value model and its optimizer. `spec`: that of the policy. On several ranks it is cut like the
    policy, and every method is collective.
    """

    def __init__(
        self,
        spec: ArchSpec,
        settings: TrainerSettings,
        own: CriticSettings,
        dtype: torch.dtype,
        device: torch.device,
        layout: TensorLayout,
        ranks: Ranks,
        numerics: Numerics,
    ) -> None:
        self.spec, self.own = spec.critic, own
        # Balancing and rounding are the policy's: what an engine never serves has no format to keep to.
        self._settings = replace(settings, moe_aux_loss_coeff=0.0, precision=None)
        self._device, self._layout, self._ranks = device, layout, ranks
        self.decoder = layout.make_decoder(self.spec, dtype)
        self.decoder.use_numerics(numerics)
        self.decoder.recompute_num_layers = settings.recompute_num_layers
        self.decoder.recompute(settings.recompute_modules)
        parameters = dict(self.decoder.named_parameters())
        self.optimizer = MasterAdamW(parameters, settings.optimizer, layout.total_norm)

    def load_weights(self, saved: ArchSpec, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Start from the published tensors of a model `saved`, a critic or a language model, whose head is
        left out. Without a value head among them all values are 0 at first.
        """
        wanted = without_spare_mtp(saved, self.spec, tensors)
        items = _with_value_head(self.spec, wanted)
        self._layout.load(self.spec, self.optimizer.parameters, items, where="critic weights")
        self.optimizer.reset_masters()

    @torch.no_grad()
    def values(self, batch: TrainBatch) -> np.ndarray:
        """Float32 [T] of the trained rows in this rank's share, 0 elsewhere."""
        values_T = np.zeros(batch.num_tokens, dtype=np.float32)
        for micro_batch in self._cut(batch):
            values_R = token_values(self.decoder, micro_batch)
            if not micro_batch.padding:
                values_T[micro_batch.trained_rows] = values_R.cpu().numpy()
        return values_T

    def update(self, batch: TrainBatch, state: TrainerState) -> CriticUpdate:
        """One optimizer step towards the returns of all sequences of the batch, each on one of the ranks.

        Loss and norm are those of the whole step on every rank, so all of them apply it or none does.
        """
        assert state.critic is not None and state.knobs.critic_lr is not None
        metrics = self._accumulate(batch)
        metrics["train/critic_grad_norm"] = norm = float(self.optimizer.global_norm())
        rate = learning_rate(state.critic.updates, state.knobs.critic_lr, self.own.schedule)
        metrics["train/critic_lr"] = rate
        if math.isfinite(norm) and math.isfinite(metrics["train/value_loss"]):
            self.optimizer.apply(rate, norm)
            return CriticUpdate(metrics)
        event = self._explain(batch, state, metrics["train/value_loss"])
        self.optimizer.clear()
        metrics["train/critic_non_finite_elements"] = float(event["count"])
        return CriticUpdate(metrics, event)

    def _accumulate(self, batch: TrainBatch) -> dict[str, float]:
        """Gradients of all micro-batches into the optimizer; their metrics over all ranks."""
        weights_T = step_weights(batch, self._settings.algorithm)
        sums: dict[str, Tensor] = {}
        for micro_batch in self._cut(batch):
            result = self._loss(micro_batch, batch, weights_T)
            (result.loss * (0.0 if micro_batch.padding else 1.0)).backward()
            self.optimizer.accumulate()
            for name, value in result.metrics.items():
                seen = torch.zeros_like(value) if micro_batch.padding else value
                sums[name] = sums[name] + seen if name in sums else seen
        self.optimizer.fill_missing_gradients()
        totals = self._ranks.sum(torch.stack(list(sums.values()))).tolist()
        return {f"train/{name}": total for name, total in zip(sums, totals, strict=True)}

    def _loss(self, micro_batch: MicroBatch, batch: TrainBatch, weights_T: np.ndarray) -> LossOutput:
        old_R, returns_R, weights_R = (
            micro_batch.trained_values(array) for array in (batch.values, batch.returns, weights_T)
        )
        assert old_R is not None and returns_R is not None and weights_R is not None
        rows = ValueRows(token_values(self.decoder, micro_batch), old_R, returns_R, weights_R)
        return value_loss(rows, self.own.value_clip)

    def _cut(self, batch: TrainBatch) -> list[MicroBatch]:
        """Without routes, which are the policy's: prompts are shared wherever their tokens agree."""
        own = replace(batch, routes=None)
        share = may_share_prompts(self.decoder, self._settings, own)
        indices_N = trained_sequences(own)
        return cut_micro_batches(own, indices_N, self._settings, self._device, self._ranks, share)

    def _explain(self, batch: TrainBatch, state: TrainerState, loss: float) -> dict[str, Any]:
        trained_T = batch.loss_mask > 0
        arrays = {"values": batch.values, "returns": batch.returns}
        inputs = ((name, torch.from_numpy(a[trained_T])) for name, a in arrays.items() if a is not None)
        return find_non_finite(
            state.step,
            self._settings.non_finite_policy,
            weights=self._named(self.optimizer.parameters),
            loss_inputs=inputs,
            gradients=self._named(self.optimizer.gradients()),
            loss=loss,
        )

    def _named(self, native: dict[str, Any]) -> NamedTensors:
        """Under published names with `critic.` before them, which tells them from the policy's."""
        published = self._layout.published(self.spec, native, everywhere=True)
        return ((f"critic.{name}", tensor) for name, tensor in published)


def _with_value_head(spec: ArchSpec, items: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """A head of zeros where none comes: the first values are all 0, and the first advantages are returns."""
    has_head = False
    for name, tensor in items:
        has_head |= name == spec.head_name
        yield name, tensor
    if not has_head:
        yield spec.head_name, torch.zeros(spec.head_rows, spec.hidden_size)
