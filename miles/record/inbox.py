"""The control inbox: requests to a running run are files in its directory, answered with events.

A request is taken up at a step boundary, in the order of posting, and acknowledged with an event of kind
`control`; then its file moves to control/handled/. A request that was meant for an attempt that has ended is
acknowledged as expired, so that a stop does not stop the run that was resumed after it.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from miles.errors import RunError
from miles.record import events as kinds
from miles.record.heartbeat import read_heartbeats
from miles.record.json_file import read_json, write_json
from miles.record.layout import RunLayout
from miles.record.writer import RecordWriter

ACTIONS = ("stop", "save", "set")
"""`set` changes live settings: its `patch` holds dotted keys of the run's config and their new values."""


@dataclass(frozen=True)
class Request:
    """One request. `attempt` is the attempt that was running when it was posted."""

    id: str
    action: str
    attempt: int
    time: float
    by: str
    patch: dict[str, Any] = field(default_factory=dict)


def post_request(
    run_dir: str | Path, action: str, by: str = "cli", patch: dict[str, Any] | None = None
) -> Request:
    """Leave a request for the run. Raises RunError when it cannot be written."""
    assert action in ACTIONS and bool(patch) == (action == "set")
    layout = RunLayout(run_dir)
    beat = read_heartbeats(layout.heartbeat_dir).get("driver")
    attempt = beat.attempt if beat else 0
    request = Request(f"{time.time_ns()}-{action}", action, attempt, time.time(), by, patch or {})
    try:
        layout.control_dir.mkdir(parents=True, exist_ok=True)
        write_json(layout.control_dir / f"{request.id}.json", asdict(request))
    except OSError as error:
        raise RunError(
            f"the request to {action} cannot be written",
            where=str(layout.control_dir),
            why=str(error.strerror),
        ) from error
    return request


def _is_patch(patch: object) -> bool:
    return isinstance(patch, dict) and bool(patch) and all(isinstance(v, int | float) for v in patch.values())


class Inbox:
    """The run's side: which requests wait, and their acknowledgement through `writer`."""

    def __init__(self, writer: RecordWriter) -> None:
        self._writer, self._layout = writer, writer.layout
        self._handled: set[str] = set()

    def pending(self) -> list[Request]:
        """Requests of this attempt in order of posting. Stale, unreadable and unknown ones are answered."""
        waiting = []
        for path in sorted(self._layout.control_dir.glob("*.json")):
            request = None if path.stem in self._handled else self._read(path)
            if request is None:
                continue
            if request.attempt < self._writer.attempt:
                self.acknowledge(request, "expired", why="posted to an earlier attempt")
            elif request.action not in ACTIONS:
                self.acknowledge(request, "refused", why=f"unknown action; known are {', '.join(ACTIONS)}")
            elif request.action == "set" and not _is_patch(request.patch):
                self.acknowledge(request, "refused", why="patch must hold config keys and numbers")
            else:
                waiting.append(request)
        return waiting

    def acknowledge(self, request: Request, state: str = "applied", **fields: Any) -> None:
        """Record the outcome (applied, refused or expired) and put the request away."""
        self._writer.event(
            kinds.CONTROL, request=request.id, action=request.action, state=state, by=request.by, **fields
        )
        self._put_away(self._layout.control_dir / f"{request.id}.json")

    def _put_away(self, path: Path) -> None:
        """Move a request out of the inbox; where the disk refuses, this attempt remembers it as handled."""
        self._handled.add(path.stem)
        with suppress(OSError):
            path.rename(self._layout.handled_dir / path.name)

    def _read(self, path: Path) -> Request | None:
        try:
            return Request(**read_json(path))
        except (RunError, TypeError) as error:
            self._writer.event(
                kinds.CONTROL, request=path.stem, action="unreadable", state="refused", why=str(error)
            )
            self._put_away(path)
            return None
