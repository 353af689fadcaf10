"""A process that a dashboard would have started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass
class Started:
    """Stands in for a `miles` process that was started; the tests say what it has done."""

    arguments: list[str]
    log: Path
    exit_code: int | None = None
    directory: Path | None = None
    error: str = ""

    def run_dir(self) -> Path | None:
        return self.directory

    def last_error(self) -> str:
        return self.error

    def keep_log_in(self, logs_dir: Path) -> None:
        self.log = logs_dir / "train.log"
