"""The reward stands still while more and more groups lose every success: the updates do harm."""

from __future__ import annotations

from miles.diagnosis.finding import Evidence, Fix, Match, Severity, Tier
from miles.diagnosis.patches import gentler, lower_lr
from miles.diagnosis.rule import rule
from miles.diagnosis.view import RecordView

REWARD = "rollout/raw_reward"
ALL_ZERO = "rollout/zero_std/all_zero_percentage"


@rule(
    "OP11",
    "Updates too large to learn from",
    tier=Tier.TUNING,
    severity=Severity.WARNING,
    symptom="the mean reward is no better than at the start or falls, and groups without any success have "
    "grown by half and by a fifth of all groups, to 35 % or more",
    cause="each update throws the policy past what it learns: prompts that it could solve are lost as fast "
    "as others are won",
    remedy="lower the learning rate; go on from the last checkpoint before the loss, or start again",
    source="a learning rate of 3e-3 on the sorting task, at which some seeds collapse (OP8) and others stall",
    thresholds=(
        "failed_groups",
        "failed_growth",
        "failed_growth_share",
        "lr_cut",
        "no_gain_steps",
        "mean_steps",
    ),
)
def overshooting(view: RecordView) -> Match | None:
    trend = view.reward
    if trend is None or not trend.is_stuck(view.thresholds) or trend.has_collapsed(view.thresholds):
        return None
    lost = lost_groups(view)
    if lost is None:
        return None
    flat = view.evidence(f"mean reward {trend.first:.3f} at first, {trend.last:.3f} now", REWARD, 10)
    lr = view.setting("optimizer.lr")
    cause = (
        f"learning rate too high{f' ({lr:g})' if lr else ''}: updates lose as many prompts as they win, and "
        "a group in which nothing succeeds has no advantage, so nothing leads back"
    )
    return Match(trend.peak_step, (lost, flat), _fixes(view, trend.peak_step), cause=cause)


def lost_groups(view: RecordView) -> Evidence | None:
    """Groups in which nothing succeeds have become many, and clearly more than they were."""
    failed, before = view.recent_mean(ALL_ZERO), view.first_mean(ALL_ZERO)
    limits = view.thresholds
    if failed is None or before is None or failed < limits.failed_groups:
        return None
    if failed < limits.failed_growth * before or failed - before < limits.failed_growth_share:
        return None
    return view.evidence(f"groups without any success: {before:.0%} -> {failed:.0%}", ALL_ZERO)


def _fixes(view: RecordView, peak_step: int) -> tuple[Fix, ...]:
    live = gentler(view, view.thresholds.lr_cut) if view.is_live else ()
    checkpoint = view.checkpoint_before(peak_step)
    back = lower_lr(view, view.thresholds.lr_cut, checkpoint, "go on from before the loss")
    return (*live, *(() if back is None else (back,)))


RULES = (overshooting,)
