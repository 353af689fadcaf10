"""One optimizer step of the Megatron trainer; the native trainer's `update` says what a step is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from miles.algorithms.losses import LossOutput, LossRows, PolicyLossSettings, policy_loss, sft_loss
from miles.data.batch import TrainBatch
from miles.errors import MilesError
from miles.training.draft_course import DraftUpdate
from miles.training.megatron.draft import DraftTraining
from miles.training.megatron.groups import from_last_stage
from miles.training.megatron.optimizer import MasterAdam
from miles.training.megatron.passes import Chunks, Pass, PassSettings
from miles.training.megatron.tensors import MegatronTensors
from miles.training.native.forward import ForwardOutput
from miles.training.native.measurements import PassMeasurements
from miles.training.native.micro_batches import MicroBatch
from miles.training.native.non_finite import find_non_finite
from miles.training.native.ranks import Ranks
from miles.training.native.schedule import learning_rate
from miles.training.native.state import TrainerState
from miles.training.native.step_batch import StepBatch
from miles.training.native.update import Update
from miles.training.settings import TrainerSettings

Cut = Callable[[TrainBatch, np.ndarray], list[MicroBatch]]


@dataclass(frozen=True)
class MegatronStep:
    """One step of `optimizer`, under the knobs of `state`. `cut`: a rank's share in micro-batches."""

    chunks: Chunks
    tensors: MegatronTensors
    optimizer: MasterAdam
    settings: TrainerSettings
    state: TrainerState
    ranks: Ranks
    cut: Cut
    measurements: PassMeasurements | None
    draft: DraftTraining | None = None

    def run(self, batch: TrainBatch) -> Update:
        """Train on all sequences of `batch`. Loss and norm are those of the whole step on every rank."""
        step = StepBatch.of(batch, self.settings.algorithm, self._policy)
        self.optimizer.begin()
        draft_update = None if self.draft is None else self.draft.begin(batch, step.indices_N)
        sums = self._accumulate(step, draft_update)
        finalize_model_grads(list(self.chunks.wrapped), None)
        self._inject_fault()
        metrics = {f"train/{name}": value for name, value in sums.items()}
        metrics["train/grad_norm"] = self.optimizer.global_norm()
        metrics["train/lr"] = learning_rate(self.state.updates, self.state.knobs.lr, self.settings.schedule)
        event = draft_event = None
        if math.isfinite(metrics["train/loss"]) and math.isfinite(metrics["train/grad_norm"]):
            draft_event = None if draft_update is None else self._finish_draft(metrics)
            self.optimizer.apply(metrics["train/lr"], metrics["train/grad_norm"])
        else:
            event = self._explain(batch, metrics["train/loss"])
        metrics["train/non_finite_elements"] = 0.0 if event is None else float(event["count"])
        metrics["train/step_skipped"] = float(event is not None)
        draft_applied = draft_update is not None and event is None and draft_event is None
        return Update(metrics, event, draft_event, draft_applied)

    def _finish_draft(self, metrics: dict[str, float]) -> dict[str, Any] | None:
        """As `native.update.OptimizerStep` does."""
        assert self.draft is not None
        self.draft.reduce()
        if self.draft.finish(self.tensors, metrics["train/lr"], metrics):
            return None
        event = self._find_non_finite((), metrics["train/mtp_loss"])
        metrics["train/mtp_non_finite_elements"] = float(event["count"])
        return event

    def _accumulate(self, step: StepBatch, draft_update: DraftUpdate | None) -> dict[str, float]:
        """Gradients of all micro-batches; returns metrics summed over them and over the ranks.

        Sequences whose advantages are all 0 have no gradient where advantages are its only source: they are
        measured, but not differentiated.
        """
        parts = [(step.indices_N, True)]
        differentiated = False
        if self._only_advantages:
            flat_N = step.without_advantage()
            parts = [(step.indices_N[~flat_N], True), (step.indices_N[flat_N], False)]
        sums: dict[str, Tensor] = {}
        for indices_N, with_gradient in parts:
            micro_batches = self.cut(step.batch, indices_N)
            steps = self._pass(step, micro_batches, sums, with_gradient, draft_update)
            outputs = steps.run(micro_batches)
            differentiated |= with_gradient and bool(micro_batches)
            if not with_gradient:
                for index, output in enumerate(outputs):
                    self._add(sums, self._result(step, micro_batches[index], output))
            self._measure(step, micro_batches, outputs)
        if not differentiated and self.chunks.layout.options.overlap_grad_reduce:
            # Nothing went backward, which would have sent the gradients of nothing on their way.
            for chunk in self.chunks.wrapped:
                chunk.start_grad_sync()
        if draft_update is not None:
            sums |= draft_update.sums
        return sums_over_ranks(sums, self.ranks)

    def _pass(
        self,
        step: StepBatch,
        micro_batches: list[MicroBatch],
        sums: dict[str, Tensor],
        with_gradient: bool,
        draft_update: DraftUpdate | None,
    ) -> Pass:
        def loss(index: int, log_probs_R: Tensor, entropy_R: Tensor | None) -> Tensor:
            output = ForwardOutput(log_probs_R, entropy_R, None)  # type: ignore[arg-type]
            result = self._result(step, micro_batches[index], output)
            self._add(sums, result)
            return result.loss

        algorithm = self.settings.algorithm
        settings = PassSettings(
            replay=self.settings.replay_routes,
            measure=self.measurements is not None,
            temperature=algorithm.temperature,
            with_entropy=algorithm.observe_training_entropy or self.state.knobs.entropy_coef != 0,
            chunk_tokens=self.settings.log_probs_chunk_size,
        )

        def teach(index: int, hidden_t1D: Tensor) -> None:
            assert self.draft is not None and draft_update is not None
            self.draft.learn(draft_update, hidden_t1D, micro_batches[index], step.batch)

        on_hidden = teach if draft_update is not None else None
        return Pass(self.chunks, settings, loss if with_gradient else None, on_hidden)

    def _result(self, step: StepBatch, micro_batch: MicroBatch, output: ForwardOutput) -> LossOutput:
        rows = step.loss_rows(micro_batch, output, self.settings.algorithm.use_rollout_logprobs)
        result = self._loss(rows)
        if not micro_batch.padding:
            return result
        return LossOutput(result.loss * 0, {name: value * 0 for name, value in result.metrics.items()})

    def _loss(self, rows: LossRows) -> LossOutput:
        if self.settings.algorithm.loss_type == "sft_loss":
            return sft_loss(rows)
        if self.settings.algorithm.custom_loss is not None:
            return self.settings.algorithm.custom_loss(rows)
        return policy_loss(rows, self._policy)

    @property
    def _policy(self) -> PolicyLossSettings:
        """The policy loss under the knobs of this step."""
        return self.state.knobs.apply(self.settings.algorithm.policy)

    @staticmethod
    def _add(sums: dict[str, Tensor], result: LossOutput) -> None:
        for name, value in result.metrics.items():
            sums[name] = sums[name] + value.detach() if name in sums else value.detach().clone()

    def _measure(
        self, step: StepBatch, micro_batches: Sequence[MicroBatch], outputs: Sequence[ForwardOutput]
    ) -> None:
        if self.measurements is None:
            return
        for micro_batch, output in zip(micro_batches, outputs, strict=True):
            if not micro_batch.padding:
                self.measurements.add_log_probs(micro_batch, output, step.batch.newest_rollout_log_probs)
                self.measurements.add_routing(micro_batch, output.router, self.settings.replay_routes)

    @property
    def _only_advantages(self) -> bool:
        """Whether no other term than the policy gradient has a gradient."""
        knobs = self.state.knobs
        other_terms = knobs.kl_loss_coef != 0 or knobs.entropy_coef != 0
        return self.settings.algorithm.loss_type == "policy_loss" and not other_terms

    def _inject_fault(self) -> None:
        fault = self.settings.fault
        if fault is None or fault.step != self.state.step:
            return
        names, layer = self.tensors.names, self.chunks.spec.num_layers // 2
        name = fault.tensor or next(n for n in names if f".layers.{layer}." in n)
        if name not in names:
            raise MilesError(
                f"no gradient is called {name!r}",
                where="debug.inject_fault",
                fix="use a published tensor name",
            )
        self.tensors.set_first_element(name, math.nan, MasterAdam.gradient)

    def _explain(self, batch: TrainBatch, loss: float) -> dict[str, Any]:
        trained_T = batch.loss_mask > 0
        own = batch.rollout_log_probs if self.settings.algorithm.use_rollout_logprobs else None
        arrays = {
            "advantages": batch.advantages,
            "old_log_probs": batch.old_log_probs,
            "ref_log_probs": batch.ref_log_probs,
            "rollout_log_probs": own,
        }
        inputs = ((name, torch.from_numpy(a[trained_T])) for name, a in arrays.items() if a is not None)
        return self._find_non_finite(inputs, loss)

    def _find_non_finite(self, inputs: Iterable[tuple[str, Tensor]], loss: float) -> dict[str, Any]:
        return find_non_finite(
            self.state.step,
            self.settings.non_finite_policy,
            weights=self.tensors.published(torch.float32, everywhere=True),
            loss_inputs=inputs,
            gradients=self.tensors.published(
                torch.float32, self.optimizer.gradient, everywhere=True, shared=self.optimizer.shares
            ),
            loss=loss,
        )


def sums_over_ranks(sums: dict[str, Tensor], ranks: Ranks) -> dict[str, float]:
    """Of all data-parallel ranks, on every stage; the names are the same wherever a loss was computed."""
    names, values = sorted(sums), None
    if names:
        values = ranks.sum(torch.stack([sums[name].float() for name in names]))
    names = from_last_stage(names or None)
    return dict(zip(names, from_last_stage(values).tolist(), strict=True))
