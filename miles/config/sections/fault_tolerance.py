"""`[fault_tolerance]`: noticing and replacing workers that fail."""

from __future__ import annotations

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat

from miles.config.sections.base import Section


class FaultToleranceSection(Section):
    """Health checks of engines and their restart."""

    use_fault_tolerance: bool = False
    """Check the engines' health and restart one that does not answer; one that died is replaced anyway."""

    max_worker_restarts: NonNegativeInt = 3
    """Times each worker process is replaced before the run ends; a start that fails counts."""

    worker_start_timeout: PositiveFloat = 600.0
    """Seconds that a worker may take to start or to find room in the cluster; then the run ends, and can be
    resumed. A node that comes back or is added within them takes over the workers of a lost one."""

    rollout_health_check_interval: PositiveFloat = 30.0
    """Seconds between health checks."""

    rollout_health_check_timeout: PositiveFloat = 30.0
    """Seconds until an unanswered check counts as a failure."""

    rollout_health_check_first_wait: NonNegativeFloat = 0.0
    """Seconds before the first check."""
