"""Reading exceptions: what was raised first, before others wrapped it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from miles.diagnosis.ray_text import plain_line, remote_worker

START = "Traceback (most recent call last):"
_LINKS = re.compile(
    r"\n(?:The above exception was the direct cause of the following exception:"
    r"|During handling of the above exception, another exception occurred:)\n"
)
_FRAME = re.compile(r'^\s+File "(.+?)", line (\d+), in (\S+)')
_RAISED = re.compile(r"^(?:[A-Za-z_]\w*\.)*([A-Za-z_]\w*)(?:\((\w+)\))?(?:: (.*))?$")
_NAMED = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception|Exit|Interrupt|Timeout)\w*)(?:\((\w+)\))?: ?(.*)$")
_REMOTE = "ray::"
TEXT_CHARS = 8000

CONSEQUENCES = frozenset(
    {
        "ActorDiedError",
        "ActorUnavailableError",
        "BrokenPipeError",
        "CancelledError",
        "ConnectionRefusedError",
        "ConnectionResetError",
        "DistBackendError",
        "DistNetworkError",
        "EOFError",
        "KeyboardInterrupt",
        "RayActorError",
        "SystemExit",
        "TimeoutError",
        "WorkerCrashedError",
    }
)
"""What the others see when somebody else has failed."""


@dataclass(frozen=True)
class Failure:
    """One exception as it was first raised."""

    type: str
    message: str
    worker: str
    step: int | None
    place: str
    """File, line and function of the innermost frame, "" when the traceback does not tell."""
    wrapped_in: tuple[str, ...]
    """Types of the exceptions around it, innermost first."""
    text: str
    """The end of everything that was printed of it."""
    time: float = 0.0
    """Seconds since the epoch, as far as it is known."""
    log: str = ""
    """Log file and line, "" when the run recorded it."""

    @property
    def is_consequence(self) -> bool:
        return self.type in CONSEQUENCES


@dataclass(frozen=True)
class _Raised:
    type: str
    message: str
    place: str


def failure_of(event: dict[str, Any]) -> Failure:
    """The root of a recorded exception event."""
    text = event["traceback"]
    origin, *outer = raised_in(text) or [_Raised(event["type"], event["message"], "")]
    return Failure(
        origin.type,
        origin.message,
        remote_worker(text) or event["worker"],
        event.get("step"),
        origin.place,
        tuple(link.type for link in outer),
        text[-TEXT_CHARS:],
        event.get("time", 0.0),
    )


def failure_in_text(text: str, worker: str, time: float, log: str) -> Failure | None:
    """The root of one printed traceback; None when it was cut before it named an exception."""
    links = raised_in(text)
    if not links:
        return None
    origin, *outer = links
    return Failure(
        origin.type,
        origin.message,
        remote_worker(plain_line(text)) or worker,
        None,
        origin.place,
        tuple(link.type for link in outer),
        text[-TEXT_CHARS:],
        time,
        log,
    )


def first_real(failures: Iterable[Failure]) -> Failure | None:
    """The first failure that is not the echo of another; the first of all when every one is."""
    found = list(failures)
    return next((f for f in found if not f.is_consequence), found[0] if found else None)


def raised_in(text: str) -> list[_Raised]:
    """Every exception of a chained traceback, the original first.

    Ray prints the remote traceback behind the name of its own wrapper: the innermost one comes last there,
    and a wrapper that stands for the remote class (`RayTaskError(ValueError)`) is not counted again.
    """
    links: list[_Raised] = []
    for block in _LINKS.split(plain_line(text)):
        raised = list(_raised_in_block(block))
        if raised and (raised[0].message.startswith(_REMOTE) or _REMOTE in raised[0].message):
            *wrappers, origin = raised
            raised = [origin, *(w for w in reversed(wrappers) if w.type != origin.type)]
        links += raised
    return links


def _raised_in_block(block: str) -> Iterator[_Raised]:
    """Exceptions in the order printed: the first unindented line after frames names one."""
    lines = block.splitlines()
    frames: list[str] = []
    seen = False
    for line in lines:
        if (frame := _FRAME.match(line)) is not None:
            frames.append(f"{frame[1]}:{frame[2]} in {frame[3]}")
        elif frames and line.strip() and not line[0].isspace() and (match := _RAISED.match(line)) is not None:
            # Ray names the class it stands for: RayTaskError(ValueError).
            yield _Raised(match[2] or match[1], match[3] or "", frames[-1])
            frames, seen = [], True
    if not seen:
        found = next((m for line in lines if (m := _NAMED.match(line.strip())) is not None), None)
        if found is not None:
            yield _Raised(found[2] or found[1], found[3], frames[-1] if frames else "")
