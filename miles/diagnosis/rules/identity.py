"""What must be equal before anything has been learned, and what a mode or a resume promises to keep equal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from miles.diagnosis.finding import Evidence, Fix, FixKind, Match, Severity, Tier
from miles.diagnosis.patches import CHECK_SYNC
from miles.diagnosis.rule import rule
from miles.diagnosis.view import RecordView

GAP = "train/train_rollout_logprob_abs_diff"
KL = "train/kl_loss"
POLICY, REFERENCE = "rollout/log_probs", "rollout/ref_log_probs"


@rule(
    "MM1",
    "The first update is not on policy",
    tier=Tier.NUMERICS,
    severity=Severity.WARNING,
    symptom="in the first step, before any weight has changed, ppo_kl or pg_clipfrac is not zero",
    cause="the pass that computed the old log-probs and the training pass are not the same function: another "
    "kernel, another packing, or weights that were not loaded alike",
    remedy="use deterministic attention in both passes; check the load",
    source="miles ci_utils (1e-9, 1e-10); slime debug.md",
    thresholds=("identity_exact", "identity_jitter", "identity_clipfrac"),
)
def first_step_identity(view: RecordView) -> Match | None:
    if (
        view.foreign
        or view.setting("algorithm.use_rollout_logprobs")
        or (view.setting("training.num_steps_per_rollout") or 1) > 1
    ):
        return None
    limits = view.thresholds
    exact = view.setting("alignment.true_on_policy_mode")
    bounds = {
        "train/ppo_kl": limits.identity_exact if exact else limits.identity_jitter,
        "train/pg_clipfrac": limits.identity_exact if exact else limits.identity_clipfrac,
    }
    evidence = tuple(
        Evidence(f"{name} is {value:.2g} in the first step, expected 0", name, ((1, value),))
        for name, bound in bounds.items()
        if (value := view.series(name).at(1)) is not None and abs(value) > bound
    )
    return Match(1, evidence, (CHECK_SYNC,)) if evidence else None


@rule(
    "MM2",
    "Policy and reference differ before training",
    tier=Tier.NUMERICS,
    severity=Severity.WARNING,
    symptom="in the first step the mean log-probs of policy and reference differ (more than kernel jitter; "
    "5e-3 where routes are replayed)",
    cause="the reference was not loaded from the checkpoint that training starts from, or its pass is "
    "another function",
    remedy="check --ref-load; expect a small offset with routing replay",
    source="miles log_utils (1e-8; 5e-3 with R3)",
    thresholds=("identity_jitter", "reference_replayed"),
)
def reference_differs(view: RecordView) -> Match | None:
    policy, reference = view.series(POLICY).at(1), view.series(REFERENCE).at(1)
    if view.foreign or policy is None or reference is None or view.setting("model.load"):
        return None  # a policy that goes on from elsewhere is meant to differ
    limit = view.thresholds.reference_replayed if view.replays_routes else view.thresholds.identity_jitter
    if abs(policy - reference) <= limit:
        return None
    evidence = Evidence(
        f"mean log-prob in the first step: policy {policy:.5f}, reference {reference:.5f}",
        REFERENCE,
        ((1, reference),),
    )
    default = Fix(
        "take the reference from the checkpoint that training starts from",
        FixKind.RESUME,
        "none",
        (("model.ref_load", None),),
        start_over=True,
    )
    check = Fix("compare the two checkpoints", FixKind.MANUAL, "none")
    return Match(1, (evidence,), (default, check) if view.setting("model.ref_load") else (check,))


@rule(
    "MM3",
    "The KL to the reference is large from the start",
    tier=Tier.NUMERICS,
    severity=Severity.CRITICAL,
    symptom="the KL term of the first step is above 0.5 (below 1e-4 is kernel jitter); critical above 1",
    cause="policy and reference do not read the same tokens or weights: wrong chat template, wrong "
    "checkpoint, or a parallel layout that splits weights differently",
    remedy="verify the template, --ref-load and the parallel layout",
    source="miles debug.md (about 0.8 per token with a wrong template, above 1 a wrong config)",
    thresholds=("first_kl_warn", "first_kl_bad"),
)
def large_first_kl(view: RecordView) -> Match | None:
    series = view.series(KL)
    if not len(series) or series.values[0] <= view.thresholds.first_kl_warn:
        return None
    step, kl = series.steps[0], series.values[0]
    severity = Severity.CRITICAL if kl > view.thresholds.first_kl_bad else Severity.WARNING
    fix = Fix("verify chat template, --ref-load and parallel layout", FixKind.MANUAL, "none")
    evidence = Evidence(f"KL {kl:.3g} in step {step}", KL, ((step, kl),))
    return Match(step, (evidence,), (fix,), severity=severity)


@rule(
    "MM9",
    "True on-policy mode is not on policy",
    tier=Tier.NUMERICS,
    severity=Severity.CRITICAL,
    symptom="alignment.true_on_policy_mode is on, and the log-prob gap is not exactly 0",
    cause="a kernel that depends on the batch, or two sides that were launched differently",
    remedy="compare the plans of both sides; score the samples again by prefill",
    source="miles true_on_policy",
)
def not_on_policy(view: RecordView) -> Match | None:
    if not view.setting("alignment.true_on_policy_mode"):
        return None
    flagged = view.flagged_steps(GAP)
    if not flagged:
        return None
    step, gap = flagged[0]
    text = f"gap {gap:.2g} nats at step {step}, in {len(flagged)} steps; expected exactly 0"
    traced = tuple(Evidence(_traced(event)) for event in view.events("alignment_broken")[:1])
    return Match(step, (view.evidence(text, GAP), *traced), (CHECK_SYNC,))


def _traced(event: Mapping[str, Any]) -> str:
    """What reading a sequence again on both sides has shown."""
    place = f"first token {event['position']} of sample {event['sample']}"
    where = f"{event['tokens']} tokens differ at step {event['step']}, {place}"
    if event["stage"] is None:
        return f"{where}; not traced: {event['why']}"
    difference = f"{event['elements']} elements, by up to {event['max_abs']:.2g}"
    return (
        f"{where}; the first layer that differs: {event['stage']}, at token {event['token']} ({difference})"
    )


@rule(
    "MM10",
    "A deterministic run drifts from its engine",
    tier=Tier.NUMERICS,
    severity=Severity.WARNING,
    symptom="run.deterministic is on, and the mean log-prob gap is above 1e-6",
    cause="a kernel that is not deterministic, or differs between trainer and engine",
    remedy="deterministic attention on both sides; compare the plans",
    source="slime GLM-5 gate (1e-6)",
    thresholds=("gap_deterministic", "mean_steps"),
)
def deterministic_gap(view: RecordView) -> Match | None:
    gap = view.recent_mean(GAP) if view.setting("run.deterministic") else None
    if gap is None or view.is_quantised or gap <= view.thresholds.gap_deterministic:
        return None
    return Match(view.step, (view.evidence(f"mean gap {gap:.2g} nats", GAP),), (CHECK_SYNC,))


@rule(
    "MM15",
    "The log-prob gap jumped at a resume",
    tier=Tier.NUMERICS,
    severity=Severity.WARNING,
    symptom="after a resume the gap is more than three times what it was before, and above 0.01",
    cause="the engine did not get the resumed weights before its first rollout, or optimizer or reference "
    "state was not restored",
    remedy="force a full weight update before the first rollout after a resume",
    source="S#1695; band ours",
    thresholds=("resume_gap_factor", "gap_growth_floor", "mean_steps"),
)
def gap_after_resume(view: RecordView) -> Match | None:
    limits, series = view.thresholds, view.series(GAP)
    for resumed in sorted(view.history.resumes.values(), reverse=True):
        before = [v for s, v in series if s <= resumed][-limits.mean_steps :]
        after = [v for s, v in series if s > resumed][:3]
        if not before or not after or not view.is_recent(resumed):
            continue
        usual, now = statistics.median(before), statistics.median(after)
        if now > max(limits.gap_growth_floor, limits.resume_gap_factor * usual):
            text = f"gap {usual:.2g} before the resume at step {resumed}, {now:.2g} after it"
            return Match(resumed, (view.evidence(text, GAP),), (CHECK_SYNC,))
    return None


RULES = (
    first_step_identity,
    reference_differs,
    large_first_kl,
    not_on_policy,
    deterministic_gap,
    gap_after_resume,
)
