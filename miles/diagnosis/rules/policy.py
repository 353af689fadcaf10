"""Does the policy keep the variety it learns from?"""

from __future__ import annotations

from miles.diagnosis.finding import Fix, FixKind, Match, Severity, Tier
from miles.diagnosis.patches import change, gentler
from miles.diagnosis.rule import rule
from miles.diagnosis.view import RecordView

ENTROPY = "train/entropy"


@rule(
    "OP6",
    "Entropy collapse",
    tier=Tier.TUNING,
    severity=Severity.WARNING,
    symptom="entropy below 0.05, or 70 % below its start, while the reward is no better than at the "
    "start or falls "
    "(a policy that solves its task also gets sure, and that is healthy)",
    cause="the policy has settled on one kind of answer before finding a good one",
    remedy="clip-higher (0.28), an entropy bonus, a higher sampling temperature",
    source="slime docs (monitoring); DAPO; reward condition from five healthy runs whose entropy fell "
    "79-85 %",
    thresholds=("entropy_low", "entropy_fall", "no_gain_steps", "mean_steps"),
)
def entropy_collapse(view: RecordView) -> Match | None:
    limits = view.thresholds
    first, last = view.first_mean(ENTROPY), view.recent_mean(ENTROPY)
    if first is None or last is None or view.reward is None or not view.reward.is_stuck(limits):
        return None
    if last >= limits.entropy_low and last >= (1 - limits.entropy_fall) * first:
        return None
    evidence = (
        view.evidence(f"entropy {first:.3g} in the first steps, {last:.3g} in the last", ENTROPY),
        view.evidence(
            f"reward {view.reward.first:.3f} at first, {view.reward.last:.3f} now", "rollout/raw_reward"
        ),
    )
    fixes = []
    if (view.setting("algorithm.eps_clip_high") or 0) < 0.28:
        higher = (("algorithm.eps_clip_high", 0.28),)
        fixes.append(
            Fix("let unlikely tokens grow more (clip-higher)", FixKind.RESUME, "noisier updates", higher)
        )
    bonus = ("algorithm.entropy_coef", max(1e-3, 2 * (view.setting("algorithm.entropy_coef") or 0.0)))
    fixes.append(change(view, "reward entropy more", "too much of it ruins the policy", bonus))
    return Match(view.step, evidence, tuple(fixes))


@rule(
    "OP7",
    "Entropy explosion",
    tier=Tier.TUNING,
    severity=Severity.WARNING,
    symptom="entropy above 1 and more than twice its start, while the reward is no better than at the "
    "start or falls",
    cause="the policy forgets what it knew: clip-higher too generous, an entropy bonus, noisy rewards",
    remedy="lower eps_clip_high or the entropy bonus",
    source="rllm #116",
    thresholds=("entropy_high", "entropy_rise", "no_gain_steps", "mean_steps"),
)
def entropy_explosion(view: RecordView) -> Match | None:
    limits = view.thresholds
    first, last = view.first_mean(ENTROPY), view.recent_mean(ENTROPY)
    if first is None or last is None or view.reward is None or not view.reward.is_stuck(limits):
        return None
    if last <= limits.entropy_high or last <= limits.entropy_rise * first:
        return None
    evidence = view.evidence(f"entropy {first:.3g} in the first steps, {last:.3g} in the last", ENTROPY)
    if view.setting("algorithm.entropy_coef"):
        key, text = ("algorithm.entropy_coef", 0.0), "take the entropy bonus away"
    else:
        key, text = ("algorithm.eps_clip_high", 0.2), "let unlikely tokens grow less"
    return Match(view.step, (evidence,), (change(view, text, "less exploration", key), *gentler(view)))


RULES = (entropy_collapse, entropy_explosion)
