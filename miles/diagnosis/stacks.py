"""Where the live workers of a run stand now: a stack of each, without disturbing them.

py-spy reads the stack from outside and does not pause the process. Without it, a process that has
opened a run record writes its stacks to a file when it gets SIGUSR2; the signal is sent only where the kernel
says that the process handles it, since it would end any other.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from miles.record import RunLayout
from miles.record.heartbeat import Heartbeat, process_exists
from miles.record.stack_file import STACK_SIGNAL

SECONDS = 30
SIGNAL_SECONDS = 10
"""Until a process that handles the signal must have written; one that hangs in a library may not."""
STILL_SECONDS = 0.25
"""Without a new line the stacks are whole."""
WITHOUT = "install py-spy (pip install py-spy) and run miles diagnose --stacks again"


@dataclass(frozen=True)
class WorkerStack:
    """One worker: its stacks as text, or why there are none."""

    writer: str
    pid: int
    phase: str | None
    text: str | None
    problem: str = ""


def dump_stacks(layout: RunLayout, heartbeats: Mapping[str, Heartbeat]) -> Iterator[WorkerStack]:
    """The stacks of every worker of the run; those of other machines are named with the command to type."""
    for writer, beat in sorted(heartbeats.items()):
        if beat.host != socket.gethostname():
            there = f"it runs on {beat.host}: there, py-spy dump --nonblocking --pid {beat.pid}"
            yield WorkerStack(writer, beat.pid, beat.phase, None, there)
        elif process_exists(beat.pid, beat.process_start):
            yield _dump(layout, writer, beat)


def _dump(layout: RunLayout, writer: str, beat: Heartbeat) -> WorkerStack:
    text, problem = _with_py_spy(beat.pid)
    if text is None:
        text = _by_signal(beat.pid, layout.stacks(writer))
    return WorkerStack(writer, beat.pid, beat.phase, text, "" if text is not None else problem)


def _with_py_spy(pid: int) -> tuple[str | None, str]:
    program = find_py_spy()
    if program is None:
        return None, WITHOUT
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return None, f"py-spy gave no answer within {SECONDS} s"
    if done.returncode == 0:
        return done.stdout.strip(), ""
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
    return None, f"py-spy failed ({last}); it needs the same user, or: sudo {' '.join(command)}"


def find_py_spy() -> str | None:
    """py-spy on the PATH, or beside this Python."""
    beside = Path(sys.executable).with_name("py-spy")
    return shutil.which("py-spy") or (str(beside) if beside.exists() else None)


def _by_signal(pid: int, file: Path) -> str | None:
    """Ask the process itself, where it has said that it can answer; None where it cannot."""
    if not file.exists() or not handles_signal(pid, STACK_SIGNAL):
        return None
    before = file.stat().st_size
    try:
        os.kill(pid, STACK_SIGNAL)
    except (ProcessLookupError, PermissionError):
        return None
    began = since = time.monotonic()
    size = before
    while (now := time.monotonic()) < began + SIGNAL_SECONDS:
        grown = file.stat().st_size
        if grown > size:
            size, since = grown, now
        elif size > before and now > since + STILL_SECONDS:
            break
        time.sleep(0.05)
    return file.read_bytes()[before:].decode("utf-8", "replace").strip() or None


def handles_signal(pid: int, number: signal.Signals) -> bool:
    """Whether the kernel says that the process catches the signal; False where there is no /proc."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)
