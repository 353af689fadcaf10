"""The critic of PPO in Megatron's form; `native.critic` says what one is.

A second model, cut like the policy. Its head is on the last pipeline stage, whole on every tensor-parallel
rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from miles.arch.spec import ArchSpec
from miles.data.batch import TrainBatch
from miles.training.critic_course import CriticCourse, CriticUpdate
from miles.training.megatron.chunks import training_chunks
from miles.training.megatron.layout import MegatronLayout
from miles.training.megatron.optimizer import MasterAdam
from miles.training.megatron.sharded_adam import ShardedAdam
from miles.training.megatron.tensors import MegatronTensors
from miles.training.megatron.update import Cut, sums_over_ranks
from miles.training.megatron.values import ValuePass
from miles.training.native.micro_batches import MicroBatch, trained_sequences
from miles.training.native.ranks import Ranks
from miles.training.native.state import TrainerState


class Critic:
    """The value model and its optimizer. Implements `training.critic_course.CriticModel`."""

    def __init__(
        self,
        course: CriticCourse,
        layout: MegatronLayout,
        dtype: torch.dtype,
        device: torch.device,
        ranks: Ranks,
        cut: Cut,
    ) -> None:
        self.spec, self._course, self._ranks, self._cut_share = course.spec, course, ranks, cut
        # FP8 is a rounding of the policy's, whose engine rounds as well.
        plain = replace(layout, options=replace(layout.options, fp8_format=None, fp8_recipe=None))
        self.chunks = training_chunks(self.spec, plain, course.settings, dtype, device)
        self.tensors = MegatronTensors(self.spec, self.chunks.bare, device)
        adam = ShardedAdam if plain.options.distributed_optimizer else MasterAdam
        self.optimizer = adam(self.chunks.wrapped, course.settings.optimizer, dtype, plain)

    def load_weights(self, saved: ArchSpec, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.tensors.load(self._course.beginning(saved, tensors), where="critic weights")
        self.optimizer.reset_masters()

    def values(self, batch: TrainBatch) -> np.ndarray:
        micro_batches = self._cut(batch)
        values_T = np.zeros(batch.num_tokens, dtype=np.float32)
        found = ValuePass(self.chunks, None).values(micro_batches)
        for micro_batch, values_R in zip(micro_batches, found, strict=True):
            if not micro_batch.padding:
                values_T[micro_batch.trained_rows] = values_R.cpu().numpy()
        return values_T

    def update(self, batch: TrainBatch, state: TrainerState) -> CriticUpdate:
        self.optimizer.begin()
        metrics = self._accumulate(batch)
        finalize_model_grads(list(self.chunks.wrapped), None)
        metrics["train/critic_grad_norm"] = self.optimizer.global_norm()
        weights = self.tensors.published(torch.float32, everywhere=True)
        gradients = self.tensors.published(
            torch.float32, self.optimizer.gradient, everywhere=True, shared=self.optimizer.shares
        )
        return self._course.finish(metrics, batch, state, self.optimizer, weights, gradients)

    def _accumulate(self, batch: TrainBatch) -> dict[str, float]:
        """Gradients of all micro-batches; their metrics over all ranks."""
        micro_batches, weights_T = self._cut(batch), self._course.weights(batch)
        sums: dict[str, Tensor] = {}

        def loss(index: int, values_R: Tensor) -> Tensor:
            result = self._course.loss(values_R, micro_batches[index], batch, weights_T)
            for name, value in result.metrics.items():
                sums[name] = sums[name] + value if name in sums else value.clone()
            return result.loss

        ValuePass(self.chunks, loss).values(micro_batches)
        return {f"train/{name}": total for name, total in sums_over_ranks(sums, self._ranks).items()}

    def _cut(self, batch: TrainBatch) -> list[MicroBatch]:
        """Without routes, which are the policy's: prompts are shared wherever their tokens agree."""
        own = replace(batch, routes=None)
        return self._cut_share(own, trained_sequences(own))
