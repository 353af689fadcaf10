"""What a user sees when something is wrong, and the exit code of each kind of ending."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every `miles` command."""

    OK = 0
    FAILED = 1
    """The run or the command failed."""
    USAGE = 2
    """Usage or configuration error."""
    REFUSED = 3
    """Preflight refused the run before it started."""
    UNAVAILABLE = 4
    """A cluster, backend or environment is not available."""
    CRITICAL = 5
    """`miles diagnose` found a critical condition."""
    RUNNING = 8
    """The run is still going on."""
    INTERRUPTED = 130
    TERMINATED = 143


class MilesError(ValueError):
    """A mistake that the user can mend: what is wrong, where, why, and what to type next.

    Args are kept positional in `args`, so instances survive pickling between processes.
    """

    exit_code: ExitCode = ExitCode.FAILED

    def __init__(self, what: str, where: str = "", why: str = "", fix: str = "") -> None:
        super().__init__(what, where, why, fix)
        self.what, self.where, self.why, self.fix = what, where, why, fix

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        lines = [head]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)

    @property
    def in_one_line(self) -> str:
        """Where, what and why, for a message that has a remedy of its own."""
        why = f" ({self.why})" if self.why else ""
        return f"{self.where}: {self.what}{why}" if self.where else f"{self.what}{why}"


class ConfigError(MilesError):
    """A run file, profile or flag is wrong. `problems` holds every mistake found in one pass."""

    exit_code = ExitCode.USAGE

    def __init__(self, *problems: MilesError) -> None:
        ValueError.__init__(self, *problems)
        self.problems = problems
        self.what = "\n".join(str(p) for p in problems)
        self.where = self.why = self.fix = ""

    def __str__(self) -> str:
        return self.what


class PreflightRefused(MilesError):
    """The plan breaks a rule of severity error."""

    exit_code = ExitCode.REFUSED


class DataError(MilesError):
    """A prompt file, a row or a sample is not what it must be."""


class CheckpointError(MilesError):
    """A checkpoint is missing, truncated, or does not match its config."""


class RunError(MilesError):
    """A run directory is missing, unreadable, or not in the state the command needs."""


class Unavailable(MilesError):
    """Something outside the process is not there: a cluster, an engine, an optional package."""

    exit_code = ExitCode.UNAVAILABLE
