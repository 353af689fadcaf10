"""Is time lost that need not be? Advice, not alarms."""

from __future__ import annotations

import statistics

from miles.diagnosis.finding import Fix, FixKind, Match, Severity, Tier
from miles.diagnosis.rule import rule
from miles.diagnosis.view import RecordView

WAIT = "perf/wait_time_ratio"
MFU = "perf/actor_train_mfu"
CACHE_HITS = "rollout/prefix_cache_hit_rate"
DENSITY = "perf/update_weights_density"


@rule(
    "SY4",
    "Trainer and engines wait for each other",
    tier=Tier.TUNING,
    severity=Severity.WARNING,
    symptom="the trainer waits for more than half of the time (0.3 when rollouts run ahead)",
    cause="the split of GPUs between training and rollouts does not fit the work",
    remedy="move GPUs to the slower side; run one step ahead",
    source="miles (wait_time_ratio); thresholds ours",
    thresholds=("wait_ratio", "wait_ratio_async", "mean_steps"),
)
def waiting(view: RecordView) -> Match | None:
    share = view.recent_mean(WAIT)
    limit = view.thresholds.wait_ratio_async if view.runs_ahead else view.thresholds.wait_ratio
    if share is None or share <= limit:
        return None
    fix = Fix("give the rollouts more GPUs, or run one step ahead", FixKind.MANUAL, "none")
    return Match(view.step, (view.evidence(f"{share:.0%} of the time is waited", WAIT),), (fix,))


@rule(
    "SY5",
    "The trainer uses little of the GPU",
    tier=Tier.TUNING,
    severity=Severity.INFO,
    symptom="model FLOPs utilisation below 0.15, the first step left out",
    cause="small micro-batches, recomputation, or a layout that communicates too much",
    remedy="more tokens per micro-batch, less recomputation, less tensor parallelism",
    source="miles advisory.py (0.15)",
    thresholds=("flops_share",),
)
def low_utilisation(view: RecordView) -> Match | None:
    values = [v for v in view.series(MFU).values[1:] if v == v]
    if len(values) < 3 or (mean := statistics.fmean(values)) >= view.thresholds.flops_share:
        return None
    fix = Fix("raise --max-tokens-per-gpu; recompute less", FixKind.MANUAL, "more memory")
    return Match(view.step, (view.evidence(f"utilisation {mean:.1%}", MFU),), (fix,))


@rule(
    "SY8",
    "The prefix cache is not used",
    tier=Tier.TUNING,
    severity=Severity.INFO,
    symptom="less than 10 % of prompt tokens come from the cache, although groups share their prompts",
    cause="requests of one group or session go to different engines, or the cache is switched off",
    remedy="send a group or session to one engine",
    source="miles advisory.py (10 %)",
    thresholds=("cache_hits", "mean_steps"),
)
def cold_cache(view: RecordView) -> Match | None:
    share = view.recent_mean(CACHE_HITS)
    if share is None or share >= view.thresholds.cache_hits:
        return None
    if (view.setting("rollout.n_samples_per_prompt") or 1) < 4:
        return None
    fix = Fix("route by group or session (affinity)", FixKind.MANUAL, "less even load")
    return Match(view.step, (view.evidence(f"{share:.0%} of prompt tokens", CACHE_HITS),), (fix,))


@rule(
    "SY19",
    "A weight update changes very many weights",
    tier=Tier.TUNING,
    severity=Severity.INFO,
    symptom="more than 10 % of the weights differ from one update to the next (about 2 % is usual for BF16)",
    cause="a learning rate that is too high, or an error in the delta",
    remedy="compare with a full update; lower the learning rate",
    source="LMSYS 2026-08-18; 10 % is ours",
    thresholds=("weight_density", "mean_steps"),
)
def dense_update(view: RecordView) -> Match | None:
    share = view.recent_mean(DENSITY)
    if share is None or share <= view.thresholds.weight_density:
        return None
    fix = Fix("send a full update once and compare", FixKind.MANUAL, "one slow update")
    return Match(view.step, (view.evidence(f"{share:.1%} of weights", DENSITY),), (fix,))


RULES = (waiting, low_utilisation, cold_cache, dense_update)
