"""What a trainer is besides weights and moments."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from miles.training.knobs import Knobs


@dataclass(frozen=True)
class CriticProgress:
    """`rollouts` counts those that the critic has seen, `updates` the optimizer steps that changed it."""

    rollouts: int = 0
    updates: int = 0


@dataclass(frozen=True)
class TrainerState:
    """`step` counts optimizer steps, skipped ones and those of the critic alone included; `updates` only
    those that changed the policy.
    """

    knobs: Knobs
    configured: Knobs
    """The knobs as the configuration has them; those in effect differ by what was changed in the live run."""
    step: int = 0
    updates: int = 0
    draft_updates: int | None = None
    """Updates of the MTP layers; None where they are not trained, and have no moments."""
    critic: CriticProgress | None = None
    """None where there is no critic."""

    def under(self, configured: Knobs) -> TrainerState:
        """The same state in a run of another configuration: a knob that it changes takes its value from
        there, the others keep what was set live.
        """
        before, now = asdict(self.configured), asdict(configured)
        changed = {name: value for name, value in now.items() if value != before[name]}
        return replace(self, knobs=replace(self.knobs, **changed), configured=configured)
