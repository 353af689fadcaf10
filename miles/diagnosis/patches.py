"""Patches that several rules propose, each marked with how it takes effect in the run as it stands."""

from __future__ import annotations

from typing import Any

from miles.diagnosis.finding import Fix, FixKind
from miles.diagnosis.live import LIVE_SETTINGS
from miles.diagnosis.view import RecordView

TIS_BOUND = 2.0
"""slime's default upper bound of truncated importance weights."""
SMALL_KL = 1e-3

CHECK_SYNC = Fix(
    "check that the engine got the trainer's weights, and that both use the same chat template and sampling "
    "temperature",
    FixKind.MANUAL,
    "none",
)
REPLAY = Fix(
    "replay the engine's routes in the trainer (R3)",
    FixKind.RESUME,
    "none known; the engine must return its routes",
    (("alignment.use_rollout_routing_replay", True),),
)


def change(view: RecordView, text: str, risk: str, *patch: tuple[str, Any]) -> Fix:
    """A change of settings: live where the run goes on and every setting is a live one, else by resuming."""
    live = view.is_live and all(
        key in LIVE_SETTINGS and isinstance(value, int | float) for key, value in patch
    )
    return Fix(text, FixKind.LIVE if live else FixKind.RESUME, risk, patch)


def truncated_importance_sampling(view: RecordView) -> tuple[Fix, ...]:
    """Switch the correction on, where it is off and can have an effect."""
    if view.setting("correction.use_tis") or view.setting("algorithm.use_rollout_logprobs"):
        return ()
    text, risk = "weigh tokens by truncated importance sampling", "treats the symptom; adds variance"
    if view.is_live:
        return (change(view, f"{text} (a bound switches it on)", risk, ("correction.tis_clip", TIS_BOUND)),)
    return (change(view, text, risk, ("correction.use_tis", True)),)


def gentler(view: RecordView, factor: float = 3.0) -> tuple[Fix, ...]:
    """Divide the learning rate from here on; empty when it is not known."""
    lower = lowered_lr(view, factor)
    if lower is None:
        return ()
    lr = view.setting("optimizer.lr")
    return (
        change(
            view,
            f"lower the learning rate {lr:g} -> {lower:g}",
            "learns more slowly",
            ("optimizer.lr", lower),
        ),
    )


def gentler_critic(view: RecordView, factor: float = 3.0) -> tuple[Fix, ...]:
    """Divide the critic's learning rate, which is the policy's where it has none of its own."""
    lr = view.setting("critic.critic_lr") or view.setting("optimizer.lr")
    if not lr:
        return ()
    lower = float(f"{lr / factor:.0e}")
    text = f"lower the critic's learning rate {lr:g} -> {lower:g}"
    return (change(view, text, "its values follow more slowly", ("critic.critic_lr", lower)),)


def tether(view: RecordView) -> tuple[Fix, ...]:
    """Double the pull towards the reference model, or set it up."""
    held, coefficient = view.setting("algorithm.use_kl_loss"), view.setting("algorithm.kl_loss_coef")
    if held and coefficient:
        more = ("algorithm.kl_loss_coef", 2 * coefficient)
        return (change(view, "pull harder towards the reference model", "learns more slowly", more),)
    if held:
        start = ("algorithm.kl_loss_coef", SMALL_KL)
        return (change(view, "pull towards the reference model", "learns more slowly", start),)
    return ()


def lowered_lr(view: RecordView, factor: float) -> float | None:
    """The learning rate divided by `factor`, rounded to one digit; None when it is not known."""
    lr = view.setting("optimizer.lr")
    return float(f"{lr / factor:.0e}") if lr else None


def lower_lr(view: RecordView, factor: float, checkpoint: int | None, text: str) -> Fix | None:
    """Divide the learning rate, rounded to one digit, and go on from `checkpoint` (None: start again)."""
    lower = lowered_lr(view, factor)
    if lower is None:
        return None
    where = "start again, there is no earlier checkpoint" if checkpoint is None else text
    return Fix(
        f"{where}: learning rate {view.setting('optimizer.lr'):g} -> {lower:g}",
        FixKind.RESUME,
        "learns more slowly",
        (("optimizer.lr", lower),),
        from_step=checkpoint,
        start_over=checkpoint is None,
    )
