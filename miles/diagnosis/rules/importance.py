"""Do importance weights stay near one? Rules over the weights that correct for off-policy data."""

from __future__ import annotations

from miles.diagnosis.finding import Fix, FixKind, Match, Severity, Tier
from miles.diagnosis.patches import CHECK_SYNC, REPLAY
from miles.diagnosis.rule import rule
from miles.diagnosis.view import RecordView

CATASTROPHIC = "train/mis_catastrophic_seq_fraction"
ESS = "train/ess_ratio"


@rule(
    "MM11",
    "Importance weights are truncated too often",
    tier=Tier.NUMERICS,
    severity=Severity.CRITICAL,
    symptom="more than 1 % of tokens have a truncated importance weight (0.1 % is normal); critical "
    "above 5 %",
    cause="the data is too far off policy: precision mismatch, routing flips, or stale weights",
    remedy="one precision on both sides, replayed routes, less staleness",
    source="NVIDIA-NeMo/ProRL-Agent-Server #40 (6e-4 to 1e-3 normal)",
    thresholds=("tis_clipfrac_warn", "tis_clipfrac_bad", "mean_steps"),
)
def truncated_weights(view: RecordView) -> Match | None:
    limits = view.thresholds
    share = view.recent_mean("train/tis_clipfrac")
    if share is None or share <= limits.tis_clipfrac_warn:
        return None
    severity = Severity.CRITICAL if share > limits.tis_clipfrac_bad else Severity.WARNING
    evidence = view.evidence(f"{share:.2%} of tokens truncated", "train/tis_clipfrac")
    fixes = (REPLAY,) if view.is_moe and not view.replays_routes else (CHECK_SYNC,)
    return Match(view.step, (evidence,), fixes, severity=severity)


@rule(
    "MM12",
    "Importance weights are off on average",
    tier=Tier.NUMERICS,
    severity=Severity.WARNING,
    symptom="the mean importance weight (tis, ois) is outside 0.8 - 1.2",
    cause="a systematic shift between the two sides: chat template, temperature, top-p or top-k",
    remedy="make the sampling parameters equal on both sides; sample with top-p 1 and no top-k",
    source="NVIDIA-NeMo/ProRL-Agent-Server #40 (0.75 in a broken run)",
    thresholds=("importance_low", "importance_high", "mean_steps"),
)
def biased_weights(view: RecordView) -> Match | None:
    limits = view.thresholds
    evidence = tuple(
        view.evidence(f"{name} averages {mean:.3f}", name)
        for name in ("train/tis", "train/ois")
        if (mean := view.recent_mean(name)) is not None
        and not limits.importance_low <= mean <= limits.importance_high
    )
    if not evidence:
        return None
    neutral = {"rollout.rollout_top_p": 1.0, "rollout.rollout_top_k": -1}
    patch = tuple((key, value) for key, value in neutral.items() if view.setting(key) not in (None, value))
    full = Fix("sample from the whole distribution", FixKind.RESUME, "less greedy samples", patch)
    return Match(view.step, evidence, (full, CHECK_SYNC) if patch else (CHECK_SYNC,))


@rule(
    "MM13",
    "Sequences with catastrophic tokens",
    tier=Tier.NUMERICS,
    severity=Severity.WARNING,
    symptom="more than 1 % of sequences hold a token whose trainer probability is below 1e-4 of the engine's",
    cause="the engine samples tokens that the trainer holds nearly impossible: other weights, other "
    "precision, or another expert for single tokens",
    remedy="leave such sequences out (rs_veto_threshold 1e-4); replay routes; verify the weight sync",
    source="miles mis.md (veto at 1e-4 to 1e-6)",
    thresholds=("catastrophic_sequences", "mean_steps"),
)
def catastrophic_tokens(view: RecordView) -> Match | None:
    share = view.recent_mean(CATASTROPHIC)
    if share is None or share <= view.thresholds.catastrophic_sequences:
        return None
    veto = Fix(
        "leave out sequences with such tokens",
        FixKind.RESUME,
        "fewer samples per step",
        (("correction.use_rs", True), ("correction.rs_veto_threshold", 1e-4)),
    )
    evidence = view.evidence(f"{share:.1%} of sequences", CATASTROPHIC)
    return Match(view.step, (evidence,), (veto, CHECK_SYNC))


@rule(
    "OP4",
    "Few samples carry the update",
    tier=Tier.NUMERICS,
    severity=Severity.CRITICAL,
    symptom="the effective sample size of the importance ratios is below 0.8; critical below 0.5",
    cause="the data is stale, or too many optimizer steps are taken on it",
    remedy="bound the staleness; fewer steps per rollout; truncated importance sampling",
    source="miles (ess_ratio); bands ours",
    thresholds=("ess_warn", "ess_bad", "mean_steps"),
)
def small_effective_sample(view: RecordView) -> Match | None:
    limits = view.thresholds
    ess = view.recent_mean(ESS)
    if ess is None or ess >= limits.ess_warn:
        return None
    severity = Severity.CRITICAL if ess < limits.ess_bad else Severity.WARNING
    fixes = []
    if (view.setting("training.num_steps_per_rollout") or 1) > 1:
        fixes.append(
            Fix(
                "take one optimizer step per rollout",
                FixKind.RESUME,
                "fewer updates per sample",
                (("training.num_steps_per_rollout", 1), ("training.global_batch_size", None)),
            )
        )
    fixes.append(Fix("bound the staleness of samples (max_weight_staleness)", FixKind.MANUAL, "less overlap"))
    return Match(
        view.step, (view.evidence(f"effective share {ess:.2f}", ESS),), tuple(fixes), severity=severity
    )


RULES = (truncated_weights, biased_weights, catastrophic_tokens, small_effective_sample)
