"""Does PPO's critic foresee returns, and does it follow them at a sensible pace?"""

from __future__ import annotations

from miles.diagnosis.finding import Fix, FixKind, Match, Severity, Tier
from miles.diagnosis.patches import gentler_critic
from miles.diagnosis.rule import rule
from miles.diagnosis.view import RecordView

VALUE_CLIPFRAC = "train/value_clipfrac"
EXPLAINED_VARIANCE = "train/explained_variance"

ALONE = Fix(
    "start again, the critic alone for some rollouts: --num-critic-only-steps", FixKind.MANUAL, "slower start"
)


@rule(
    "OP9",
    "The critic is unstable",
    tier=Tier.TUNING,
    severity=Severity.WARNING,
    symptom="more than 30 % of value predictions are clipped",
    cause="the critic moves too fast, or started without warm-up",
    remedy="train the critic alone for some steps first; lower its learning rate",
    source="miles (value_clipfrac); threshold ours",
    thresholds=("value_clipfrac", "mean_steps"),
)
def unstable_critic(view: RecordView) -> Match | None:
    share = view.recent_mean(VALUE_CLIPFRAC)
    if share is None or share <= view.thresholds.value_clipfrac:
        return None
    evidence = view.evidence(f"{share:.0%} of values are clipped", VALUE_CLIPFRAC)
    return Match(view.step, (evidence,), (*gentler_critic(view), ALONE))


@rule(
    "OP12",
    "The critic is worse than a constant",
    tier=Tier.TUNING,
    severity=Severity.WARNING,
    symptom="over the last five steps, subtracting the values from the returns adds variance to them "
    "(explained variance below -0.1)",
    cause="the critic moves too fast, or its checkpoint knows another reward; advantages are then noisier "
    "than without it",
    remedy="lower the critic's learning rate; train it alone for some steps first",
    source="ours: on the quickstart's task -0.8 at a critic's rate of 0.1, at least 0 in three runs at 4e-4",
    thresholds=("explained_variance", "mean_steps"),
)
def useless_critic(view: RecordView) -> Match | None:
    explained = view.recent_mean(EXPLAINED_VARIANCE)
    if explained is None or explained >= view.thresholds.explained_variance:
        return None
    text = f"the values explain {explained:.2f} of the variance of returns"
    return Match(view.step, (view.evidence(text, EXPLAINED_VARIANCE),), (*gentler_critic(view), ALONE))


RULES = (unstable_critic, useless_critic)
