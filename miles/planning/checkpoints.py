"""How much disk the training checkpoints of a run take."""

from __future__ import annotations

from dataclasses import dataclass

from miles.arch import ArchSpec
from miles.planning.memory import ADAM_BYTES, BYTES, MASTER_BYTES


@dataclass(frozen=True)
class CheckpointPlan:
    """Checkpoints of a run: how many lie on disk at most, and the bytes of one (weights and optimizer)."""

    kept: int
    bytes_each: int

    @property
    def total_bytes(self) -> int:
        return self.kept * self.bytes_each


def plan_checkpoints(
    spec: ArchSpec,
    dtype: str,
    num_rollouts: int,
    save_interval: int | None,
    keep: int | None,
    critic: bool = False,
) -> CheckpointPlan:
    """One more than `keep` lies on disk while the newest is written. `critic`: one lies beside the policy."""
    width = BYTES[dtype]
    per_parameter = width + ADAM_BYTES + (MASTER_BYTES if width < 4 else 0)
    written = 1 if save_interval is None else -(-num_rollouts // save_interval)
    kept = written if keep is None else min(written, keep + 1)
    parameters = spec.num_parameters() + (spec.critic.num_parameters() if critic else 0)
    return CheckpointPlan(kept, parameters * per_parameter)
