"""The critic of PPO: a decoder of the policy's form whose head gives one number, trained beside the policy.

It shares no weight with the policy, has an optimizer of its own, routes by itself and rounds nothing. Its
head is published as `score.weight` [1, D], which transformers reads as a sequence classifier of one label.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from miles.arch.spec import ArchSpec
from miles.data.batch import TrainBatch
from miles.models.numerics import Numerics
from miles.training.critic_course import CriticCourse, CriticUpdate
from miles.training.native.forward import token_values
from miles.training.native.micro_batches import MicroBatch, cut_micro_batches, trained_sequences
from miles.training.native.optimizer import MasterAdamW
from miles.training.native.ranks import Ranks
from miles.training.native.shared_prompts import may_share_prompts
from miles.training.native.state import TrainerState
from miles.training.native.tensor_layout import TensorLayout


class Critic:
    """The value model and its optimizer. Implements `training.critic_course.CriticModel`."""

    def __init__(
        self,
        course: CriticCourse,
        dtype: torch.dtype,
        device: torch.device,
        layout: TensorLayout,
        ranks: Ranks,
        numerics: Numerics,
    ) -> None:
        self.spec, self._course = course.spec, course
        self._device, self._layout, self._ranks = device, layout, ranks
        settings = course.settings
        self.decoder = layout.make_decoder(self.spec, dtype)
        self.decoder.use_numerics(numerics)
        self.decoder.recompute_num_layers = settings.recompute_num_layers
        self.decoder.recompute(settings.recompute_modules)
        parameters = dict(self.decoder.named_parameters())
        self.optimizer = MasterAdamW(parameters, settings.optimizer, layout.total_norm)

    def load_weights(self, saved: ArchSpec, tensors: Iterable[tuple[str, Tensor]]) -> None:
        items = self._course.beginning(saved, tensors)
        self._layout.load(self.spec, self.optimizer.parameters, items, where="critic weights")
        self.optimizer.reset_masters()

    @torch.no_grad()
    def values(self, batch: TrainBatch) -> np.ndarray:
        values_T = np.zeros(batch.num_tokens, dtype=np.float32)
        for micro_batch in self._cut(batch):
            values_R = token_values(self.decoder, micro_batch)
            if not micro_batch.padding:
                values_T[micro_batch.trained_rows] = values_R.cpu().numpy()
        return values_T

    def update(self, batch: TrainBatch, state: TrainerState) -> CriticUpdate:
        metrics = self._accumulate(batch)
        metrics["train/critic_grad_norm"] = float(self.optimizer.global_norm())
        weights, gradients = (
            self._layout.published(self.spec, native, everywhere=True)
            for native in (self.optimizer.parameters, self.optimizer.gradients())
        )
        update = self._course.finish(metrics, batch, state, self.optimizer, weights, gradients)
        self.optimizer.clear()
        return update

    def _accumulate(self, batch: TrainBatch) -> dict[str, float]:
        """Gradients of all micro-batches into the optimizer; their metrics over all ranks."""
        weights_T = self._course.weights(batch)
        sums: dict[str, Tensor] = {}
        for micro_batch in self._cut(batch):
            values_R = token_values(self.decoder, micro_batch)
            result = self._course.loss(values_R, micro_batch, batch, weights_T)
            result.loss.backward()
            self.optimizer.accumulate()
            for name, value in result.metrics.items():
                sums[name] = sums[name] + value if name in sums else value
        self.optimizer.fill_missing_gradients()
        totals = self._ranks.sum(torch.stack(list(sums.values()))).tolist()
        return {f"train/{name}": total for name, total in zip(sums, totals, strict=True)}

    def _cut(self, batch: TrainBatch) -> list[MicroBatch]:
        """Without routes, which are the policy's: prompts are shared wherever their tokens agree."""
        own, settings = replace(batch, routes=None), self._course.settings
        share = may_share_prompts(self.decoder, settings, own)
        return cut_micro_batches(own, trained_sequences(own), settings, self._device, self._ranks, share)
