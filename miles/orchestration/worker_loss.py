"""What is said when a worker process is gone."""

from __future__ import annotations

from miles.errors import RunError


class WorkerLost(RunError):
    """A worker's process ended or could not be reached. `worker` is its name, as `engine-0`."""

    def __init__(self, worker: str, reason: str, fix: str = "") -> None:
        super().__init__(f"{worker} was lost", "", reason, fix or f"look at logs/{worker}.log")
        self.worker, self.reason = worker, reason

    def __reduce__(self) -> tuple[type[WorkerLost], tuple[str, str, str]]:
        return type(self), (self.worker, self.reason, self.fix)
