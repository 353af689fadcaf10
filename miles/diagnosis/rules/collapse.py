"""The reward has fallen and stays down: what killed the policy?"""

from __future__ import annotations

from miles.diagnosis.finding import Evidence, Fix, FixKind, Match, Severity, Tier
from miles.diagnosis.patches import gentler, lower_lr
from miles.diagnosis.rule import rule
from miles.diagnosis.rules.overshoot import lost_groups
from miles.diagnosis.trend import RewardTrend
from miles.diagnosis.view import RecordView

REWARD = "rollout/raw_reward"
ACTIVE = "train/active_group_fraction"
GRAD_NORM = "train/grad_norm"
LENGTH = "rollout/response_len/mean"


@rule(
    "OP8",
    "Reward collapse",
    tier=Tier.TUNING,
    severity=Severity.CRITICAL,
    symptom="the mean reward of the last five steps is more than 30 % below its best level, by more "
    "than noise",
    cause="the policy was pushed to where it earns nothing, and groups without a success give no "
    "gradient back",
    remedy="resume from the last checkpoint before the fall with a lower learning rate; if the learning "
    "rate is "
    "not the cause, look at samples from before and after the fall",
    source="slime docs; recipes that collapse on the sorting task (learning rates 1e-2, 4e-3 and, with some "
    "seeds, 3e-3)",
    thresholds=(
        "collapse_drop",
        "collapse_noise",
        "collapse_min_steps",
        "collapse_window",
        "dead_active_groups",
        "failed_groups",
        "failed_growth",
        "failed_growth_share",
        "collapse_grad_growth",
        "collapse_length_at_cap",
        "sudden_death_steps",
        "collapse_alive",
        "lr_cut",
        "lr_cut_sudden",
        "mean_steps",
    ),
)
def reward_collapse(view: RecordView) -> Match | None:
    trend = view.reward
    if trend is None or not trend.has_collapsed(view.thresholds):
        return None
    fall = view.evidence(
        f"mean reward {trend.peak:.3f} at best (steps to {trend.peak_step}), {trend.last:.3f} now", REWARD, 10
    )
    signs = [sign for sign in (_dead_groups(view), _gradient(view, trend), _length(view)) if sign is not None]
    checkpoint = view.checkpoint_before(trend.peak_step)
    if not signs:
        look = Fix(
            f"compare samples of step {trend.peak_step} with those of step {view.step}; check that the "
            f"verifier "
            "still answers",
            FixKind.MANUAL,
            "none",
        )
        cause = "not told by the record: groups still differ, gradients and lengths are as before"
        return Match(trend.peak_step, (fall,), (look,), cause=cause)
    sudden = _died_suddenly(view)
    cut = view.thresholds.lr_cut_sudden if sudden else view.thresholds.lr_cut
    back = lower_lr(view, cut, checkpoint, "go on from before the fall")
    fixes = (*_catch(view, trend, cut), *(() if back is None else (back,)))
    lr = view.setting("optimizer.lr")
    cause = (
        f"learning rate too high{f' ({lr:g})' if lr else ''}: "
        f"{'a few updates threw' if sudden else 'update after update pushed'} the policy away from what "
        f"it could do; "
        "groups in which nothing succeeds have no advantage, so nothing leads back"
    )
    return Match(trend.peak_step, (fall, *signs), fixes, cause=cause)


def _catch(view: RecordView, trend: RewardTrend, factor: float) -> tuple[Fix, ...]:
    """A running policy that still earns something can recover by itself once the updates get smaller."""
    can_recover = view.is_live and trend.last > view.thresholds.collapse_alive * trend.peak
    return gentler(view, factor) if can_recover else ()


def _dead_groups(view: RecordView) -> Evidence | None:
    """Many groups no longer carry a gradient because nothing in them succeeds."""
    active, before = view.recent_mean(ACTIVE), view.first_mean(ACTIVE)
    limit = view.thresholds.dead_active_groups
    if active is not None and before is not None and active <= limit and active < before / 2:
        return view.evidence(f"active groups fell from {before:.0%} to {active:.0%}", ACTIVE)
    return lost_groups(view)


def _gradient(view: RecordView, trend: RewardTrend) -> Evidence | None:
    """The gradient grew while the reward fell, or has vanished."""
    first, last = view.first_mean(GRAD_NORM), view.recent_mean(GRAD_NORM)
    if first is None or last is None:
        return None
    if last == 0:
        return view.evidence("the gradient is exactly zero: no group carries an advantage", GRAD_NORM)
    width = view.thresholds.mean_steps
    values = view.series(GRAD_NORM).values[-view.thresholds.collapse_window :]
    highest = max(sum(values[i : i + width]) / width for i in range(len(values) - width + 1))
    if highest >= view.thresholds.collapse_grad_growth * first:
        return view.evidence(f"gradient norm rose from {first:.2g} to {highest:.2g}", GRAD_NORM)
    return None


def _length(view: RecordView) -> Evidence | None:
    """Responses run into the length cap."""
    length, first = view.recent_mean(LENGTH), view.first_mean(LENGTH)
    cap = view.setting("rollout.rollout_max_response_len")
    if length is None or first is None or not cap:
        return None
    if length < view.thresholds.collapse_length_at_cap * cap or length <= first:
        return None
    return view.evidence(f"mean length {length:.1f} of at most {cap}, {first:.1f} at the start", LENGTH)


def _died_suddenly(view: RecordView) -> bool:
    values = view.head(REWARD, view.thresholds.sudden_death_steps)
    return min(values[1:]) < 0.1 * max(values[:2])


RULES = (reward_collapse,)
