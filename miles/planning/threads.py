"""How many CPU threads a process gets.

Measured on two cores: a 128×64×64 product takes 14 µs on one thread, 25 µs on two, and 15–30 ms on two
beside another busy process, because the OpenMP pool spins. One thread per process is the rule for small
models; large matrices use every core, with waiting threads that sleep.
"""

from __future__ import annotations

from dataclasses import dataclass

from miles.arch import ArchSpec

LARGE_HIDDEN_SIZE = 1024
"""From this width on a matrix product is long enough to repay waking a second thread."""


@dataclass(frozen=True)
class ThreadPlan:
    """Threads of one process, and the rule that chose them."""

    count: int
    rule: str

    @property
    def exports(self) -> dict[str, str]:
        """What must be in the environment before torch loads."""
        variables = {"OMP_NUM_THREADS": str(self.count)}
        return variables if self.count == 1 else variables | {"OMP_WAIT_POLICY": "PASSIVE"}


def is_small(spec: ArchSpec) -> bool:
    """Whether the model's matrices are too small for a second thread."""
    return spec.hidden_size < LARGE_HIDDEN_SIZE


def plan_threads(explicit: int | None, shell: str | None, spec: ArchSpec | None, cores: int) -> ThreadPlan:
    """The run file wins over the shell's OMP_NUM_THREADS, which wins over the rule."""
    if explicit is not None:
        return ThreadPlan(explicit, "run.threads")
    if shell is not None and shell.isdigit() and int(shell) > 0:
        return ThreadPlan(int(shell), "OMP_NUM_THREADS of the shell")
    if spec is None or is_small(spec):
        return ThreadPlan(1, "one thread per process for small models")
    return ThreadPlan(cores, "all cores for large matrices")
