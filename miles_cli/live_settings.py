"""`key=value` words as a patch of live settings, and the run's answer to it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from miles.diagnosis.live import LIVE_SETTINGS
from miles.errors import ConfigError, MilesError, RunError
from miles.record import RunReader

POLL_SECONDS = 0.2


def parse_changes(words: Sequence[str]) -> dict[str, float]:
    """The patch. Raises ConfigError with every mistake: one that is not live, a value that is no number."""
    patch: dict[str, float] = {}
    problems = []
    for word in words:
        key, _, text = word.partition("=")
        if key not in LIVE_SETTINGS:
            problems.append(_not_live(key, word))
            continue
        try:
            patch[key] = float(text)
        except ValueError:
            problems.append(MilesError(f"{word!r} gives no number", fix=f"{key}=NUMBER"))
    if problems:
        raise ConfigError(*problems)
    return patch


def wait_for_answer(run_dir: Path, request: str) -> dict[str, Any]:
    """The `control` event that acknowledges the request. Raises RunError when the run ends without one."""
    reader = RunReader(run_dir)
    while True:
        ended = reader.status().ended
        reader.poll()
        answer = next((e for e in reader.events("control") if e["request"] == request), None)
        if answer is not None:
            return answer
        if ended:
            raise RunError("the run ended before it answered", where=run_dir.name)
        time.sleep(POLL_SECONDS)


def _not_live(key: str, word: str) -> MilesError:
    near = get_close_matches(key, LIVE_SETTINGS, n=1, cutoff=0.5)
    return MilesError(
        f"{key!r} is not a live setting",
        why=f"live settings: {', '.join(sorted(LIVE_SETTINGS))}",
        fix=f"did you mean {near[0]}?" if near else f"stop the run, then: miles runs resume RUN --set {word}",
    )
