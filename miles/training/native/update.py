"""One optimizer step: forward and backward over micro-batches, checks, clipping, AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles.algorithms.losses import LossOutput, LossRows, PolicyLossSettings, policy_loss, sft_loss
from miles.data.batch import TrainBatch
from miles.models.decoder import Decoder
from miles.training.critic_course import CriticUpdate
from miles.training.draft_course import DraftUpdate
from miles.training.native.draft import DraftTraining
from miles.training.native.faults import inject_gradient_fault
from miles.training.native.forward import forward, make_router
from miles.training.native.gap_watch import GapWatch
from miles.training.native.measurements import PassMeasurements
from miles.training.native.micro_batches import MicroBatch, cut_micro_batches
from miles.training.native.non_finite import find_non_finite
from miles.training.native.optimizer import MasterAdamW
from miles.training.native.ranks import Ranks
from miles.training.native.schedule import learning_rate
from miles.training.native.shared_prompts import may_share_prompts
from miles.training.native.state import TrainerState
from miles.training.native.step_batch import StepBatch
from miles.training.native.tensor_layout import TensorLayout
from miles.training.settings import TrainerSettings
from miles.weights.native_map import joint


@dataclass(frozen=True)
class Update:
    """The outcome of one optimizer step; `event` says why it was skipped, None when it was applied."""

    metrics: dict[str, float]
    event: dict[str, Any] | None = None
    draft_event: dict[str, Any] | None = None
    """Why the draft alone was not updated."""
    draft_applied: bool = False
    critic_event: dict[str, Any] | None = None
    """Why the critic was not updated."""
    critic_alone: bool = False
    """The policy took no step: its critic warms up."""

    @classmethod
    def of_critic(cls, critic: CriticUpdate) -> Update:
        """A step of the critic alone."""
        skipped = {"train/step_skipped": float(critic.event is not None)}
        return cls(critic.metrics | skipped, critic_event=critic.event, critic_alone=True)

    def beside(self, critic: CriticUpdate | None) -> Update:
        """The step of policy and critic."""
        if critic is None:
            return self
        return replace(self, metrics=self.metrics | critic.metrics, critic_event=critic.event)

    @property
    def applied(self) -> bool:
        """Whether the policy's weights changed."""
        return self.event is None and not self.critic_alone

    @property
    def events(self) -> list[dict[str, Any]]:
        events = (self.event, self.draft_event, self.critic_event)
        return [event for event in events if event is not None]


@dataclass(frozen=True)
class OptimizerStep:
    """One step of `optimizer` on `decoder`, under the knobs of `state`.

    `measurements` collects the gap to the engine and the routing agreement; given for the first pass over a
    rollout batch, whose weights are the ones the engine sampled with.
    """

    decoder: Decoder
    optimizer: MasterAdamW
    settings: TrainerSettings
    state: TrainerState
    device: torch.device
    measurements: PassMeasurements | None
    ranks: Ranks
    layout: TensorLayout
    gap_watch: GapWatch | None = None
    draft: DraftTraining | None = None
    before_update: Callable[[], None] | None = None
    """Called when all of the step was seen, and the weights are still those it was seen with."""

    def run(self, batch: TrainBatch) -> Update:
        """Train on all sequences of `batch`, each on one of the ranks.

        Loss and norm are those of the whole step on every rank, so all of them apply it or none does.
        """
        step = StepBatch.of(batch, self.settings.algorithm, self._policy)
        draft_update = None if self.draft is None else self.draft.begin(batch, step.indices_N)
        sums = self._accumulate(step, draft_update)
        if self.before_update is not None:
            self.before_update()
        self._inject_fault()
        metrics = _read(sums | {"grad_norm": self.optimizer.global_norm()})
        metrics["train/lr"] = learning_rate(self.state.updates, self.state.knobs.lr, self.settings.schedule)
        event = draft_event = None
        if math.isfinite(metrics["train/loss"]) and math.isfinite(metrics["train/grad_norm"]):
            draft_event = None if draft_update is None else self._finish_draft(metrics)
            self.optimizer.apply(metrics["train/lr"], metrics["train/grad_norm"])
        else:
            event = self._explain(batch, metrics["train/loss"])
            self.optimizer.clear()
        if self.draft is not None:
            self.draft.optimizer.clear()
        metrics["train/non_finite_elements"] = 0.0 if event is None else float(event["count"])
        metrics["train/step_skipped"] = float(event is not None)
        draft_applied = draft_update is not None and event is None and draft_event is None
        return Update(metrics, event, draft_event, draft_applied)

    def _finish_draft(self, metrics: dict[str, float]) -> dict[str, Any] | None:
        """Update the draft beside a sound policy; the event that says why not. A sick policy's hidden states
        teach nothing, so its draft waits with it.
        """
        assert self.draft is not None
        if self.draft.finish(metrics["train/lr"], metrics):
            return None
        event = self._explain_draft(metrics["train/mtp_loss"])
        metrics["train/mtp_non_finite_elements"] = float(event["count"])
        return event

    def _accumulate(self, step: StepBatch, draft_update: DraftUpdate | None) -> dict[str, Tensor]:
        """Gradients of all micro-batches into the optimizers; returns metrics summed over them."""
        sums: dict[str, Tensor] = {}
        for micro_batch, with_gradient in self._micro_batches(step):
            with torch.set_grad_enabled(with_gradient):
                result = self._forward(micro_batch, step, draft_update)
            if with_gradient:
                result.loss.backward()
                self.optimizer.accumulate()
            for name, value in result.metrics.items():
                sums[name] = sums[name] + value if name in sums else value
        self.optimizer.fill_missing_gradients()
        if self.draft is not None and draft_update is not None:
            self.draft.optimizer.fill_missing_gradients()
            sums |= draft_update.sums
        totals = self.ranks.sum(torch.stack([value.float() for value in sums.values()]))
        return dict(zip(sums, totals, strict=True))

    def _micro_batches(self, step: StepBatch) -> Iterator[tuple[MicroBatch, bool]]:
        """Micro-batches and whether they need a gradient.

        Where advantages are the only source of gradient, sequences whose advantages are all 0 (a group of
        equal rewards) have none: they are measured, but not differentiated.
        """
        parts = [(step.indices_N, True)]
        if self._only_advantages:
            flat_N = step.without_advantage()
            parts = [(step.indices_N[~flat_N], True), (step.indices_N[flat_N], False)]
        for indices_N, with_gradient in parts:
            for micro_batch in self._cut(step, indices_N):
                yield micro_batch, with_gradient

    def _cut(self, step: StepBatch, indices_N: np.ndarray) -> list[MicroBatch]:
        share = may_share_prompts(self.decoder, self.settings, step.batch)
        return cut_micro_batches(step.batch, indices_N, self.settings, self.device, self.ranks, share)

    def _forward(
        self, micro_batch: MicroBatch, step: StepBatch, draft_update: DraftUpdate | None
    ) -> LossOutput:
        algorithm = self.settings.algorithm
        measurements = None if micro_batch.padding else self.measurements
        router = make_router(
            micro_batch,
            replay=self.settings.replay_routes,
            measure=measurements is not None,
            load_balancing=self._balances_load,
        )
        with_entropy = algorithm.observe_training_entropy or self.state.knobs.entropy_coef != 0

        def teach(hidden_TD: Tensor) -> None:
            if self.draft is not None and draft_update is not None:
                self.draft.learn(draft_update, self.decoder, hidden_TD, micro_batch, step.batch)

        output = forward(
            self.decoder,
            micro_batch,
            router,
            algorithm.temperature,
            with_entropy,
            chunk_tokens=self.settings.log_probs_chunk_size,
            on_hidden=teach,
        )
        if measurements is not None:
            measurements.add_log_probs(micro_batch, output, step.batch.newest_rollout_log_probs)
            measurements.add_routing(micro_batch, router, self.settings.replay_routes)
            if self.gap_watch is not None:
                self.gap_watch.see(self.decoder, micro_batch, step.batch, output)
        result = self._loss(step.loss_rows(micro_batch, output, algorithm.use_rollout_logprobs))
        if self._balances_load:
            balance = router.load_balancing_loss() * (micro_batch.num_packed_rows / step.num_rows)
            aux = {"aux_loss": balance.detach() / self.decoder.spec.top_k}
            result = LossOutput(result.loss + self._balance_coefficient * balance, result.metrics | aux)
        return _without_weight(result) if micro_batch.padding else result

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

    @property
    def _only_advantages(self) -> bool:
        """Whether no other term than the policy gradient has a gradient."""
        knobs = self.state.knobs
        other_terms = knobs.kl_loss_coef != 0 or knobs.entropy_coef != 0 or self._balances_load
        return self.settings.algorithm.loss_type == "policy_loss" and not other_terms

    @property
    def _balances_load(self) -> bool:
        return self.settings.moe_aux_loss_coeff != 0 and self.decoder.spec.is_moe

    @property
    def _balance_coefficient(self) -> float:
        """Megatron's convention: each layer adds coeff * E / k * sum_e f_e P_e, coeff when balanced."""
        spec = self.decoder.spec
        return self.settings.moe_aux_loss_coeff * len(spec.moe_layers) / spec.top_k

    def _inject_fault(self) -> None:
        fault = self.settings.fault
        if fault is not None and fault.step == self.state.step:
            inject_gradient_fault(fault, self.decoder.spec, self.optimizer.gradients(), self.layout)

    def _explain(self, batch: TrainBatch, loss: float) -> dict[str, Any]:
        algorithm, spec = self.settings.algorithm, self.decoder.spec
        trained_T = batch.loss_mask > 0
        arrays = {
            "advantages": batch.advantages,
            "old_log_probs": batch.old_log_probs,
            "ref_log_probs": batch.ref_log_probs,
            "rollout_log_probs": batch.rollout_log_probs if algorithm.use_rollout_logprobs else None,
        }
        inputs = ((name, torch.from_numpy(a[trained_T])) for name, a in arrays.items() if a is not None)
        return find_non_finite(
            self.state.step,
            self.settings.non_finite_policy,
            weights=self.layout.published(spec, self.optimizer.parameters, everywhere=True),
            loss_inputs=inputs,
            gradients=self.layout.published(spec, self.optimizer.gradients(), everywhere=True),
            loss=loss,
        )

    def _explain_draft(self, loss: float) -> dict[str, Any]:
        assert self.draft is not None
        spec, mine = self.draft.draft.spec, self.draft.optimizer
        weights = joint(self.optimizer.parameters, mine.parameters)
        gradients = joint(self.optimizer.gradients(), mine.gradients())
        return find_non_finite(
            self.state.step,
            self.settings.non_finite_policy,
            weights=self.layout.published(spec, weights, everywhere=True),
            loss_inputs=(),
            gradients=self.layout.published(spec, gradients, everywhere=True),
            loss=loss,
        )


def _without_weight(output: LossOutput) -> LossOutput:
    """The same computation with gradients and metrics of zero."""
    return LossOutput(output.loss * 0, {name: torch.zeros_like(v) for name, v in output.metrics.items()})


def _read(sums: dict[str, Tensor]) -> dict[str, float]:
    """Scalars under full metric names, in one transfer."""
    values = torch.stack([value.float() for value in sums.values()]).tolist()
    return {f"train/{name}": value for name, value in zip(sums, values, strict=True)}
