"""The settings that a live run may change between steps, as part of a trainer's state.

They start from `TrainerSettings`, change through `Trainer.set`, and are saved with every checkpoint.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from miles.algorithms.importance import ImportanceCorrection
from miles.algorithms.losses import PolicyLossSettings
from miles.errors import RunError
from miles.training.settings import TrainerSettings


@dataclass(frozen=True)
class Knobs:
    """Values in effect. None: the term is off."""

    lr: float
    kl_loss_coef: float
    entropy_coef: float
    tis_clip: float | None = None
    tis_clip_low: float | None = None
    tis_threshold: float | None = None
    critic_lr: float | None = None

    @classmethod
    def from_settings(cls, settings: TrainerSettings) -> Knobs:
        """The knobs as a run starts."""
        policy = settings.algorithm.policy
        correction = policy.correction
        critic_lr = None if settings.critic is None else settings.critic.lr
        knobs = cls(settings.optimizer.lr, policy.kl_loss_coef, policy.entropy_coef, critic_lr=critic_lr)
        if correction is None or not correction.applied:
            return knobs
        if correction.threshold is not None:
            return replace(knobs, tis_threshold=correction.threshold)
        return replace(knobs, tis_clip=correction.high, tis_clip_low=correction.low)

    def changed(self, knob: str, value: float, settings: TrainerSettings) -> Knobs:
        """A copy with one knob changed. Raises RunError for an unknown knob or one that this run cannot
        change.
        """
        _validate_change(knob, value, settings)
        if knob == "tis_threshold":
            return replace(self, tis_threshold=value, tis_clip=None, tis_clip_low=None)
        if knob == "tis_clip":
            return replace(self, tis_clip=value, tis_clip_low=self.tis_clip_low or 0.0, tis_threshold=None)
        if knob == "tis_clip_low":
            high = ImportanceCorrection().high if self.tis_clip is None else self.tis_clip
            return replace(self, tis_clip_low=value, tis_clip=high, tis_threshold=None)
        return replace(self, **{knob: value})

    def apply(self, policy: PolicyLossSettings) -> PolicyLossSettings:
        """The policy loss with these knobs."""
        return replace(
            policy,
            kl_loss_coef=self.kl_loss_coef,
            entropy_coef=self.entropy_coef,
            correction=self._correction(policy.correction),
        )

    def as_dict(self) -> dict[str, float]:
        """The knobs that are on."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def _correction(self, configured: ImportanceCorrection | None) -> ImportanceCorrection | None:
        """The configured one with the bounds in effect."""
        if self.tis_threshold is None and self.tis_clip is None:
            return configured
        correction = replace(configured or ImportanceCorrection(), applied=True)
        if self.tis_threshold is not None:
            return correction.within(self.tis_threshold)
        assert self.tis_clip is not None
        if correction.threshold is not None:
            correction = replace(correction, outside="clamp", threshold=None)
        return replace(correction, low=self.tis_clip_low or 0.0, high=self.tis_clip)


RANGES: dict[str, tuple[float, float]] = {
    "lr": (0.0, 1.0),
    "kl_loss_coef": (0.0, float("inf")),
    "entropy_coef": (float("-inf"), float("inf")),
    "tis_clip": (0.0, float("inf")),
    "tis_clip_low": (0.0, float("inf")),
    "tis_threshold": (0.0, 1.0),
    "critic_lr": (0.0, 1.0),
}
"""Live knobs and the values they may take, bounds included (but 0 < tis_threshold)."""


def _validate_change(knob: str, value: float, settings: TrainerSettings) -> None:
    if knob not in RANGES:
        raise RunError(f"{knob!r} is not a live knob of the trainer", fix=f"live knobs: {', '.join(RANGES)}")
    low, high = RANGES[knob]
    if not low <= value <= high or (knob == "tis_threshold" and value == 0):
        raise RunError(f"{knob} cannot be {value}", why=f"it must lie in {low:g} .. {high:g}")
    algorithm = settings.algorithm
    if knob == "kl_loss_coef" and value != 0 and not algorithm.use_kl_loss:
        raise RunError(
            "kl_loss_coef cannot be switched on in this run",
            why="no reference model was loaded at the start",
            fix="resume with algorithm.use_kl_loss = true",
        )
    if knob == "critic_lr" and settings.critic is None:
        raise RunError(
            "critic_lr has no effect in this run",
            why="the advantage estimator has no critic",
            fix="start a run with --advantage-estimator ppo",
        )
    if knob.startswith("tis_") and algorithm.use_rollout_logprobs:
        raise RunError(
            f"{knob} has no effect in this run",
            why="with algorithm.use_rollout_logprobs the importance weights are 1 by definition",
            fix="resume without algorithm.use_rollout_logprobs",
        )
    if knob.startswith("tis_") and algorithm.policy.custom_correction is not None:
        raise RunError(
            f"{knob} has no effect in this run",
            why="a function of yours stands in place of the built-in correction",
            fix="resume without correction.custom_tis_function_path",
        )
