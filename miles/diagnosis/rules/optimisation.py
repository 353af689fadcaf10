"""Does the optimizer move the policy at a sensible pace?"""

from __future__ import annotations

import math
import statistics

from miles.diagnosis.finding import Evidence, Fix, FixKind, Match, Severity, Tier
from miles.diagnosis.patches import gentler, tether
from miles.diagnosis.rule import rule
from miles.diagnosis.view import RecordView

GRAD_NORM = "train/grad_norm"
CLIPFRAC = "train/pg_clipfrac"
KL = "train/kl_loss"
MTP_LOSS = "train/mtp_loss"


@rule(
    "OP1",
    "The gradient is clipped more and more",
    tier=Tier.TUNING,
    severity=Severity.WARNING,
    symptom="in half of the last 20 steps the gradient norm is above the clipping norm, it has doubled since "
    "the first 20, and the reward is no better than at the start or falls (clipping alone is healthy: a run "
    "that learns well may clip every step)",
    cause="the learning rate is too high for where the policy stands, or outliers dominate",
    remedy="lower the learning rate; filter outlier samples",
    source="slime docs (monitoring); trend and reward conditions from five healthy runs that clip always",
    thresholds=("clip_share", "clip_growth", "grad_spike_window", "no_gain_steps", "mean_steps"),
)
def clipped_gradients(view: RecordView) -> Match | None:
    limits = view.thresholds
    window = limits.grad_spike_window
    first, last = view.head(GRAD_NORM, window), view.tail(GRAD_NORM, window)
    clip = view.setting("optimizer.clip_grad")
    if view.foreign and clip is None:
        clip = 1.0
    if len(view.series(GRAD_NORM)) < 2 * window or not last or not clip:
        return None
    if view.reward is None or not view.reward.is_stuck(limits) or view.reward.has_collapsed(limits):
        return None
    share = sum(value > clip for value in last) / len(last)
    before, now = statistics.median(first), statistics.median(last)
    if share < limits.clip_share or now < limits.clip_growth * before:
        return None
    text = f"clipped at {clip:g} in {share:.0%} of the last {window} steps; median {before:.2g} -> {now:.2g}"
    look = Fix("look for outliers among the samples", FixKind.MANUAL, "none")
    return Match(view.step, (view.evidence(text, GRAD_NORM),), (*gentler(view), look))


@rule(
    "OP3",
    "The policy moves too fast",
    tier=Tier.TUNING,
    severity=Severity.WARNING,
    symptom="the ratio of more than half of the tokens is clipped (below 0.2 is healthy)",
    cause="the learning rate is too high, or too many optimizer steps are taken on one rollout",
    remedy="lower the learning rate, or take fewer steps per rollout",
    source="slime docs (monitoring)",
    thresholds=("clipfrac_high", "mean_steps"),
)
def fast_policy(view: RecordView) -> Match | None:
    share = view.recent_mean(CLIPFRAC)
    if share is None or share <= view.thresholds.clipfrac_high:
        return None
    evidence = view.evidence(f"{share:.0%} of tokens are clipped", CLIPFRAC)
    fewer = Fix("take fewer optimizer steps per rollout", FixKind.MANUAL, "fewer updates per sample")
    return Match(view.step, (evidence,), (*gentler(view), fewer))


@rule(
    "OP5",
    "The KL to the reference jumps",
    tier=Tier.NUMERICS,
    severity=Severity.WARNING,
    symptom="the KL term is more than five times its rolling median, more than twice everything in the last "
    "20 steps, and above 0.05",
    cause="the policy diverges: a bad batch, or a learning rate that is too high",
    remedy="a larger KL coefficient, a lower learning rate; look at the samples of that step",
    source="slime docs; factor ours",
    thresholds=(
        "kl_jump_factor",
        "kl_jump_floor",
        "grad_spike_window",
        "grad_spike_min_points",
        "recent_steps",
    ),
)
def kl_jump(view: RecordView) -> Match | None:
    limits, series = view.thresholds, view.series(KL)
    start = 0 if view.whole else max(0, len(series) - limits.recent_steps)
    for i in range(start, len(series)):
        before = [v for v in series.values[max(0, i - limits.grad_spike_window) : i] if math.isfinite(v)]
        value = series.values[i]
        if len(before) < limits.grad_spike_min_points or not math.isfinite(value):
            continue
        usual = statistics.median(before)
        if value > max(limits.kl_jump_floor, limits.kl_jump_factor * usual, 2 * max(before)):
            step = series.steps[i]
            points = tuple(zip(series.steps[i - 3 : i + 2], series.values[i - 3 : i + 2], strict=True))
            evidence = Evidence(f"KL {value:.3g} at step {step}, usually {usual:.2g}", KL, points)
            look = Fix(f"look at the samples of step {step}", FixKind.MANUAL, "none")
            return Match(step, (evidence,), (*tether(view), *gentler(view), look))
    return None


@rule(
    "OP10",
    "The MTP layers do not predict",
    tier=Tier.NUMERICS,
    severity=Severity.WARNING,
    symptom="the loss of the multi-token-prediction layers is 1.0 or more",
    cause="their weights were not in the checkpoint, or they are not decoupled from the trunk",
    remedy="convert with --mtp-num-layers 1; check that the trunk is detached",
    source="miles --ci-test (1.0)",
    thresholds=("draft_loss", "mean_steps"),
)
def mtp_loss(view: RecordView) -> Match | None:
    loss = view.recent_mean(MTP_LOSS)
    if loss is None or loss < view.thresholds.draft_loss:
        return None
    fix = Fix("check that the checkpoint holds MTP weights", FixKind.MANUAL, "none")
    evidence = view.evidence(f"MTP loss {loss:.2f}", MTP_LOSS)
    return Match(view.step, (evidence,), (fix,), severity=Severity.WARNING)


RULES = (clipped_gradients, fast_policy, kl_jump, mtp_loss)
