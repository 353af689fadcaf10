"""What a pass over a batch reveals besides the loss: log-prob gap to the engine, routing agreement, expert
load.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from miles.algorithms.mismatch import log_prob_gap
from miles.arch.spec import ArchSpec
from miles.data.batch import TrainBatch
from miles.models.routing import expert_load
from miles.models.routing_stats import PassRoutes, RoutingAgreement
from miles.training.native.forward import ForwardOutput
from miles.training.native.micro_batches import MicroBatch
from miles.training.native.ranks import Ranks

DISPATCHED = "route/dispatched_flip_frac"
GAP_NAMES = {
    "abs_diff": "train/train_rollout_logprob_abs_diff",
    "abs_diff_max": "train/train_rollout_logprob_abs_diff_max",
    "abs_diff_p99": "train/train_rollout_logprob_abs_diff_p99",
    "kl": "train/train_rollout_kl",
    "ratio_above_2": "train/ratio_gt2_frac",
    "abs_diff_flipped": "train/train_rollout_logprob_abs_diff_flipped",
}


@dataclass
class PassMeasurements:
    """Collects over the micro-batches of one pass with unchanged weights."""

    spec: ArchSpec
    _seen_rows: list[np.ndarray] = field(default_factory=list)
    _train: list[Tensor] = field(default_factory=list)
    _rollout: list[Tensor] = field(default_factory=list)
    _flipped: list[Tensor] = field(default_factory=list)
    _entropy: list[Tensor] = field(default_factory=list)
    _load: Tensor | None = None
    _agreement: RoutingAgreement | None = None
    _rows: int = 0
    _replayed_rows: int = 0

    def add_log_probs(self, micro_batch: MicroBatch, output: ForwardOutput, rollout_T: np.ndarray) -> None:
        """Log-probs of one micro-batch under the trainer and, NaN where absent, under the engine (of the
        batch).
        """
        self._seen_rows.append(micro_batch.trained_rows)
        self._train.append(output.log_probs_R.detach())
        self._rollout.append(micro_batch.trained_values(rollout_T))
        self._flipped.append(_flipped(micro_batch, output))
        if output.entropy_R is not None:
            self._entropy.append(output.entropy_R.detach())

    def add_routing(self, micro_batch: MicroBatch, router: PassRoutes, replay: bool) -> None:
        """The router of one micro-batch's forward; nothing for a dense model."""
        if not self.spec.is_moe:
            return
        if router.dispatched:
            load_LE = expert_load(router.dispatched, self.spec.num_experts, micro_batch.copies_T)
            self._load = load_LE if self._load is None else self._load + load_LE
        routes = micro_batch.routes_TLK
        self._rows += micro_batch.num_packed_rows
        if routes is None:
            return
        agreement = router.agreement(micro_batch.copies_T)
        self._agreement = agreement if self._agreement is None else self._agreement + agreement
        if replay:
            self._replayed_rows += agreement.rows

    def of_sequences(self, batch: TrainBatch, sequences: np.ndarray) -> PassMeasurements | None:
        """What a pass without replay over these sequences of `batch` would measure, where that is known:
        None when a row flipped, when no routes were compared, or when a sequence was not in this pass. Where
        the router would have sent every row to the recorded experts, replay changed nothing.
        """
        if self._agreement is None or self._agreement.any_flip or batch.routes is None:
            return None
        rows, sequence_T = np.concatenate(self._seen_rows), batch.sequence_ids
        if not np.isin(sequences, sequence_T[rows]).all():
            return None
        chosen_T = np.isin(sequence_T, sequences)
        inside = torch.from_numpy(chosen_T[rows])
        recorded = int((batch.routes[chosen_T][:, 0, 0] >= 0).sum())
        return PassMeasurements(
            self.spec,
            _train=[torch.cat(self._train).cpu()[inside]],
            _rollout=[torch.cat(self._rollout).cpu()[inside]],
            _flipped=[torch.cat(self._flipped).cpu()[inside]],
            _agreement=RoutingAgreement(recorded, (0,) * len(self.spec.moe_layers), 0, 0, 0),
        )

    def over(self, ranks: Ranks) -> PassMeasurements:
        """The measurements of all ranks as one pass, the same on each of them.

        Log-probs travel themselves (16 bytes per trained token and rank), so that maximum and 99th percentile
        are those of the whole batch and not of a summary.
        """
        if ranks.size == 1:
            return self
        layers, experts = len(self.spec.moe_layers), self.spec.num_experts
        load_LE = torch.zeros(layers, experts, dtype=torch.int64) if self._load is None else self._load
        own = self._agreement or RoutingAgreement(0, (0,) * layers, 0, 0, 0)
        counts = [own.rows, own.any_flip, own.zero_overlap, own.dispatched_flips, *own.flips_per_layer]
        totals = ranks.sum(torch.tensor([self._rows, self._replayed_rows, *counts])).tolist()
        rows, replayed_rows, known, any_flip, zero_overlap, dispatched, *flips = totals
        load_LE = ranks.sum(load_LE)
        return PassMeasurements(
            self.spec,
            _train=[ranks.gather(_joined(self._train))],
            _rollout=[ranks.gather(_joined(self._rollout))],
            _flipped=[ranks.gather(_joined(self._flipped))],
            _entropy=[entropy] if (entropy := ranks.gather(_joined(self._entropy))).numel() else [],
            _load=load_LE if load_LE.any() else None,
            _agreement=RoutingAgreement(known, tuple(flips), any_flip, zero_overlap, dispatched),
            _rows=rows,
            _replayed_rows=replayed_rows,
        )

    def metrics(self) -> dict[str, float]:
        """Everything that could be measured, under full names."""
        return self.gap_metrics() | self._mean_metrics() | self.routing_metrics()

    def gap_metrics(self, suffix: str = "") -> dict[str, float]:
        """Log-prob gap between trainer and engine, over all tokens and over those whose route the trainer
        would have chosen otherwise; empty when the engine reported no log-probs.
        """
        train, rollout, flipped = (torch.cat(part) for part in (self._train, self._rollout, self._flipped))
        gap = log_prob_gap(train, rollout, torch.ones_like(train))
        if not gap:
            return {}
        of_flipped = log_prob_gap(train, rollout, flipped)
        if of_flipped:
            gap["abs_diff_flipped"] = of_flipped["abs_diff"]
        values = torch.stack(list(gap.values())).tolist()
        return {GAP_NAMES[name] + suffix: value for name, value in zip(gap, values, strict=True)}

    def routing_metrics(self) -> dict[str, float]:
        """Agreement of the router's own decisions with the recorded routes, and the busiest expert."""
        metrics: dict[str, float] = {}
        if self._load is not None:
            load_LE = self._load.double()
            busiest = (load_LE.amax(1) / load_LE.mean(1)).tolist()
            metrics["route/expert_load_max_over_mean"] = max(busiest)
            for layer, share in zip(self.spec.moe_layers, busiest, strict=True):
                metrics[f"route/expert_load_max_over_mean/layer_{layer}"] = share
        if self._rows and self.spec.is_moe:
            metrics["route/replayed_rows_frac"] = self._replayed_rows / self._rows
        return metrics | self.agreement_metrics()

    def agreement_metrics(self, suffix: str = "") -> dict[str, float]:
        """Agreement of the router's own decisions, and of what was dispatched, with the recorded routes;
        empty when none were recorded.
        """
        agreement = self._agreement
        if agreement is None or agreement.rows == 0:
            return {}
        metrics = {f"route/flip_frac{suffix}": float(np.mean(agreement.flip_rates))}
        for layer, rate in zip(self.spec.moe_layers, agreement.flip_rates, strict=True):
            metrics[f"route/flip_frac{suffix}/layer_{layer}"] = rate
        metrics[f"route/token_any_flip_frac{suffix}"] = agreement.any_flip_fraction
        metrics[f"route/zero_overlap_frac{suffix}"] = agreement.zero_overlap_fraction
        metrics[DISPATCHED + suffix] = agreement.dispatched_flip_fraction
        return metrics

    def _mean_metrics(self) -> dict[str, float]:
        train, rollout = torch.cat(self._train), torch.cat(self._rollout)
        seen = ~torch.isnan(rollout)
        # Two means that are compared are means over the same tokens.
        metrics = {"rollout/log_probs": train[seen if seen.any() else ~seen].mean().item()}
        if seen.any():
            metrics["rollout/rollout_log_probs"] = rollout[seen].mean().item()
        if self._entropy:
            metrics["rollout/entropy"] = torch.cat(self._entropy).mean().item()
        return metrics


def _flipped(micro_batch: MicroBatch, output: ForwardOutput) -> Tensor:
    """float32 [R]: 1 where the row that predicts a trained token would be routed otherwise."""
    if not output.router.measures:
        return torch.zeros_like(output.log_probs_R)
    return output.router.flipped_rows().index_select(0, micro_batch.trained_R).float()


def _joined(parts: list[Tensor]) -> Tensor:
    """One tensor; empty for the empty share of a rank."""
    return torch.cat(parts) if parts else torch.empty(0)
