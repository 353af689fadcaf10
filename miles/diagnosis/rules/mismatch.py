"""Do trainer and engine compute the same function? Rules over the gap of their log-probs.

Where rollouts run ahead the gap holds a step of learning as well: there tis_clipfrac and ESS say how stale is
too stale (MM11, OP4).
"""

from __future__ import annotations

import statistics

from miles.diagnosis.finding import Fix, FixKind, Match, Severity, Tier
from miles.diagnosis.patches import CHECK_SYNC, REPLAY, truncated_importance_sampling
from miles.diagnosis.rule import rule
from miles.diagnosis.view import RecordView

GAP = "train/train_rollout_logprob_abs_diff"
FLIPS = "route/flip_frac"


@rule(
    "MM4",
    "Mean log-prob differs between trainer and engine",
    tier=Tier.NUMERICS,
    severity=Severity.WARNING,
    symptom="|mean trainer log-prob - mean engine log-prob| of the same tokens above 0.03",
    cause="a systematic shift: wrong weights in the engine, or different tokens or temperature on the "
    "two sides",
    remedy="compare the weights of both sides; check the chat template and the sampling parameters",
    source="miles --ci-test (0.03)",
    thresholds=("gap_batch_mean", "mean_steps"),
)
def batch_mean_gap(view: RecordView) -> Match | None:
    trainer, engine = view.recent_mean("rollout/log_probs"), view.recent_mean("rollout/rollout_log_probs")
    if view.is_quantised or view.runs_ahead or trainer is None or engine is None:
        return None
    if abs(trainer - engine) <= view.thresholds.gap_batch_mean:
        return None
    text = f"mean log-prob of the last steps: trainer {trainer:.4f}, engine {engine:.4f}"
    return Match(view.step, (view.evidence(text, "rollout/log_probs"),), (CHECK_SYNC,))


def _gap_level(view: RecordView) -> tuple[float, Severity] | None:
    """Recent median gap and how bad it is, None while it is healthy or unknown."""
    values = view.tail(GAP, 3)
    if view.is_quantised or view.runs_ahead or len(values) < 3:
        return None
    gap = statistics.median(values)
    if gap <= view.thresholds.gap_warn:
        return None
    return gap, Severity.CRITICAL if gap > view.thresholds.gap_bad else Severity.WARNING


@rule(
    "MM5",
    "Log-prob gap between trainer and engine (dense model)",
    tier=Tier.NUMERICS,
    severity=Severity.CRITICAL,
    symptom="mean |trainer - engine log-prob| above 0.03 (0.01 is normal for BF16); critical above 0.1",
    cause="the engine serves other weights than the trainer has (a stale or failed sync), or its kernels and "
    "precision drift from the trainer's",
    remedy="verify the weight sync first; truncated importance sampling keeps training stable meanwhile",
    source="vllm-project/vime #64 (0.011 -> 0.036 on Qwen3-4B); slime CI (0.1)",
    thresholds=("gap_warn", "gap_bad"),
)
def dense_gap(view: RecordView) -> Match | None:
    level = None if view.is_moe else _gap_level(view)
    if level is None:
        return None
    gap, severity = level
    fixes = (CHECK_SYNC, *truncated_importance_sampling(view))
    return Match(view.step, (view.evidence(f"mean gap {gap:.3g} nats", GAP),), fixes, severity=severity)


@rule(
    "MM6",
    "Log-prob gap between trainer and engine (MoE model)",
    tier=Tier.NUMERICS,
    severity=Severity.CRITICAL,
    symptom="mean |trainer - engine log-prob| above 0.03 (normal for BF16: 0.007 with R3, 0.01-0.02 "
    "without); "
    "critical above 0.1",
    cause="trainer and engine send tokens to different experts",
    remedy="replay the engine's routes (R3); if they are replayed, verify the weight sync",
    source="M#1186 (0.013, 0.007 with R3); arXiv 2510.11370",
    thresholds=("gap_warn", "gap_bad"),
)
def moe_gap(view: RecordView) -> Match | None:
    level = _gap_level(view) if view.is_moe else None
    if level is None:
        return None
    gap, severity = level
    evidence = [view.evidence(f"mean gap {gap:.3g} nats", GAP)]
    flips = view.recent_mean(FLIPS)
    if flips is not None:
        evidence.append(view.evidence(f"{flips:.1%} of expert choices differ", FLIPS))
    if not view.replays_routes:
        return Match(
            view.step, tuple(evidence), (REPLAY, *truncated_importance_sampling(view)), severity=severity
        )
    cause = "routes are replayed, so the gap lies elsewhere: stale weights, other tokens, or drifting kernels"
    return Match(
        view.step,
        tuple(evidence),
        (CHECK_SYNC, *truncated_importance_sampling(view)),
        cause=cause,
        severity=severity,
    )


@rule(
    "MM7",
    "Log-prob gap between trainer and a quantised engine",
    tier=Tier.NUMERICS,
    severity=Severity.WARNING,
    symptom="with a quantised engine or trainer, mean |trainer - engine log-prob| above 0.3 (a flat offset "
    "up to 0.27 was seen with FP8 rollouts and BF16 training)",
    cause="more than the offset of the format: scales in another convention on the two sides, or layers "
    "quantised on one side only",
    remedy="one precision policy on both sides; keep router, embeddings and head in BF16; truncated "
    "importance sampling meanwhile",
    source="miles run_glm5_2_744b_a40b_lora.py (0.27); M#512 (0.0255 at the start of MXFP8)",
    thresholds=("gap_quantised",),
)
def quantised_gap(view: RecordView) -> Match | None:
    values = view.tail(GAP, 3)
    if not view.is_quantised or view.runs_ahead or len(values) < 3:
        return None
    gap = statistics.median(values)
    if gap <= view.thresholds.gap_quantised:
        return None
    fix = Fix("compare the formats, scales and exceptions of both sides", FixKind.MANUAL, "none")
    evidence = view.evidence(f"mean gap {gap:.3g} nats", GAP)
    return Match(view.step, (evidence,), (fix, *truncated_importance_sampling(view)))


@rule(
    "MM8",
    "The log-prob gap grows",
    tier=Tier.NUMERICS,
    severity=Severity.WARNING,
    symptom="over at least ten steps the gap has more than doubled, to above 0.01",
    cause="something gets staler with time: weights that arrive late, an engine cache from older weights, "
    "precision drift",
    remedy="compare weight versions; flush the engine's cache; lower the update interval",
    source="vllm-project/vime #64 (0.011 -> 0.036 over 30 steps)",
    thresholds=("gap_growth", "gap_growth_points", "gap_growth_floor", "mean_steps"),
)
def growing_gap(view: RecordView) -> Match | None:
    limits = view.thresholds
    first, last = view.first_mean(GAP), view.recent_mean(GAP)
    if (
        view.runs_ahead
        or first is None
        or last is None
        or len(view.series(GAP)) < limits.gap_growth_points + limits.mean_steps
    ):
        return None
    if last <= limits.gap_growth_floor or last <= limits.gap_growth * first:
        return None
    text = f"mean gap {first:.3g} in the first {limits.mean_steps} steps, {last:.3g} in the last"
    return Match(
        view.step, (view.evidence(text, GAP, 10),), (CHECK_SYNC, *truncated_importance_sampling(view))
    )


@rule(
    "MM14",
    "The log-prob gap is not measured",
    tier=Tier.NUMERICS,
    severity=Severity.INFO,
    symptom="the gap is exactly 0 while algorithm.use_rollout_logprobs is on",
    cause="the engine's log-probs serve as the old policy, so comparing the two compares a number with "
    "itself",
    remedy="recompute log-probs in the trainer when you want to know the gap",
    source="slime losses.py; PR M#1151",
)
def unmeasured_gap(view: RecordView) -> Match | None:
    values = view.tail(GAP, 3)
    if not view.setting("algorithm.use_rollout_logprobs") or len(values) < 3 or any(values):
        return None
    fix = Fix(
        "recompute the old log-probs in the trainer",
        FixKind.RESUME,
        "one more forward pass per step",
        (("algorithm.use_rollout_logprobs", False),),
    )
    return Match(view.step, (view.evidence("the gap is exactly 0", GAP, 3),), (fix,))


RULES = (
    batch_mean_gap,
    dense_gap,
    moe_gap,
    quantised_gap,
    growing_gap,
    unmeasured_gap,
)
