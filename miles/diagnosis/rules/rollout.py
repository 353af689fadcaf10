"""Is there something to learn in what was sampled?"""

from __future__ import annotations

from miles.diagnosis.finding import Fix, FixKind, Match, Severity, Tier
from miles.diagnosis.rule import rule
from miles.diagnosis.rules.overshoot import lost_groups
from miles.diagnosis.view import RecordView

LENGTH = "rollout/response_len/mean"
ZERO_STD = "rollout/zero_std/fraction"
ALL_ZERO = "rollout/zero_std/all_zero_percentage"
ALL_ONE = "rollout/zero_std/all_one_percentage"


@rule(
    "RO1",
    "Groups without a signal",
    tier=Tier.TUNING,
    severity=Severity.CRITICAL,
    symptom="in half of the groups or more all rewards are equal, while the mean reward is no better "
    "than at the "
    "start or falls; critical when nearly every group has no success at all",
    cause="the task is too easy or too hard for this policy, or the reward is broken",
    remedy="filter groups (dynamic sampling), change the mix of data; when nothing ever succeeds, check "
    "the reward",
    source="miles advisory.py (50 %); reward condition from five healthy runs that ended at 57-73 %",
    thresholds=("zero_std", "all_zero", "no_gain_steps", "mean_steps", "failed_groups", "failed_growth"),
)
def zero_std_groups(view: RecordView) -> Match | None:
    limits = view.thresholds
    share = view.recent_mean(ZERO_STD)
    if share is None or share < limits.zero_std or view.reward is None or not view.reward.is_stuck(limits):
        return None
    if view.reward.has_collapsed(limits):
        return None  # OP8 tells it: these groups are what a collapse leaves behind
    if lost_groups(view) is not None:
        return None  # OP11 tells it: the policy could solve them before
    zero, one = view.recent_mean(ALL_ZERO) or 0.0, view.recent_mean(ALL_ONE) or 0.0
    evidence = (
        view.evidence(f"{share:.0%} of groups: {zero:.0%} all fail, {one:.0%} all succeed", ZERO_STD),
        view.evidence(
            f"reward {view.reward.first:.3f} at first, {view.reward.last:.3f} now", "rollout/raw_reward"
        ),
    )
    if zero >= limits.all_zero:
        check = Fix(
            "check the reward: label key, reward type, stop token; look at a few samples beside their labels",
            FixKind.MANUAL,
            "none",
        )
        cause = "no sample earns anything: the reward does not fit the data, or the task is far too hard"
        return Match(view.step, evidence, (check,), cause=cause)
    cause = "the task is too hard for this policy" if zero > one else "the task is too easy for this policy"
    return Match(view.step, evidence, (_more_signal(view),), cause=cause, severity=Severity.WARNING)


def _more_signal(view: RecordView) -> Fix:
    if view.setting("rollout.dynamic_sampling_filter_path"):
        return Fix("change the mix of prompts", FixKind.MANUAL, "none")
    return Fix(
        "leave such groups out and sample others in their place (dynamic sampling)",
        FixKind.RESUME,
        "more samples per step",
        (("rollout.dynamic_sampling_filter_path", "check_reward_nonzero_std"),),
    )


@rule(
    "RO2",
    "Responses are cut at the length cap",
    tier=Tier.TUNING,
    severity=Severity.WARNING,
    symptom="25 % of responses or more are truncated",
    cause="the cap is too low for the task, or the policy does not stop",
    remedy="raise the cap; if responses are complete long before it, check the stop token",
    source="miles advisory.py (25 %)",
    thresholds=("truncation", "mean_steps"),
)
def truncation(view: RecordView) -> Match | None:
    share = view.recent_mean("rollout/truncated_ratio")
    if share is None or share < view.thresholds.truncation:
        return None
    evidence = [view.evidence(f"{share:.0%} of responses truncated", "rollout/truncated_ratio")]
    cap = view.setting("rollout.rollout_max_response_len")
    if not cap:
        return Match(
            view.step, tuple(evidence), (Fix("raise the length cap", FixKind.MANUAL, "more memory and time"),)
        )
    raise_cap = Fix(
        "raise the length cap",
        FixKind.RESUME,
        "longer rollouts, more memory",
        (("rollout.rollout_max_response_len", 2 * cap),),
    )
    return Match(view.step, tuple(evidence), (raise_cap,))


@rule(
    "RO3",
    "Responses grow without earning more",
    tier=Tier.TUNING,
    severity=Severity.WARNING,
    symptom="the mean length grew by half within 20 steps, or stands at the cap, and the reward did not rise",
    cause="length is rewarded by accident, or the policy lost its stop token",
    remedy="a length penalty; check the stop tokens; read the longest samples",
    source="slime FAQ 10; threshold ours",
    thresholds=("length_growth", "length_window", "length_at_cap", "no_gain_steps", "mean_steps"),
)
def length_blow_up(view: RecordView) -> Match | None:
    limits = view.thresholds
    lengths = view.tail(LENGTH, limits.length_window + limits.mean_steps)
    if (
        len(lengths) < limits.length_window + limits.mean_steps
        or view.reward is None
        or not view.reward.is_stuck(limits)
    ):
        return None
    before = sum(lengths[: limits.mean_steps]) / limits.mean_steps
    now = sum(lengths[-limits.mean_steps :]) / limits.mean_steps
    cap = view.setting("rollout.rollout_max_response_len")
    at_cap = bool(cap) and now >= limits.length_at_cap * cap
    if now <= limits.length_growth * before and not at_cap:
        return None
    text = f"mean length {before:.0f} -> {now:.0f} in {limits.length_window} steps" + (
        f", cap {cap}" if at_cap else ""
    )
    stop = Fix(
        "check the stop tokens and read the longest samples; consider a length penalty",
        FixKind.MANUAL,
        "none",
    )
    return Match(view.step, (view.evidence(text, LENGTH),), (stop,))


@rule(
    "RO4",
    "Responses repeat themselves",
    tier=Tier.TUNING,
    severity=Severity.CRITICAL,
    symptom="more than 1 % of responses are loops (their tail compresses more than tenfold); critical "
    "above 5 %",
    cause="the policy degenerates into loops",
    remedy="penalise repetition in the reward; lower the learning rate; resume from before it began",
    source="miles (repetition_frac); threshold ours",
    thresholds=("repetition_warn", "repetition_bad", "mean_steps"),
)
def repetition(view: RecordView) -> Match | None:
    limits = view.thresholds
    share = view.recent_mean("rollout/repetition_frac")
    if share is None or share <= limits.repetition_warn:
        return None
    severity = Severity.CRITICAL if share > limits.repetition_bad else Severity.WARNING
    evidence = view.evidence(f"{share:.1%} of responses repeat themselves", "rollout/repetition_frac")
    fix = Fix("give looping responses a lower reward, or resume from before it began", FixKind.MANUAL, "none")
    return Match(view.step, (evidence,), (fix,), severity=severity)


RULES = (zero_std_groups, truncation, length_blow_up, repetition)
