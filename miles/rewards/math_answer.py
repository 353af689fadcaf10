"""Mathematical equality through the math-verify library, in child processes.

sympy may take for ever on a hostile expression, and math-verify's own time limit needs the main thread; a
process can be ended from anywhere. Workers start on first use: importing math-verify takes a moment.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from miles.data.sample import Sample
from miles.errors import Unavailable
from miles.rewards.outcome import Outcome, RewardFailure

TIMEOUT_S = 10.0
STARTUP_S = 60.0
"""Time for a new process to import sympy on a busy machine, on top of the limit of its first request."""

_WORKER = Path(__file__).with_name("math_worker.py")
# -P keeps this folder off the child's path; -I would drop the user's PYTHONPATH as well.
_COMMAND = (sys.executable, "-P", str(_WORKER))


class WorkerTimeout(Exception):
    """A request took longer than its limit; the process is gone."""


class MathWorker:
    """One child process; it is started when it is needed, and again after a timeout."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, str], timeout_s: float) -> dict[str, bool]:
        """The child's reply. Blocks; raises WorkerTimeout, or Unavailable when the child died."""
        fresh = self._process is None
        if self._process is None:
            self._process = subprocess.Popen(_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = _read_line(process.stdout.fileno(), timeout_s + (STARTUP_S if fresh else 0.0))
        except BrokenPipeError:
            line = b""
        except WorkerTimeout:
            self.close()
            raise
        if not line:
            code = process.wait()
            self.close()
            raise Unavailable(
                f"the math-verify process ended with code {code}",
                where=str(_WORKER),
                why="its own message is on the standard error of this process",
                fix=f"check the installation: {sys.executable} -c 'import math_verify'",
            )
        reply: dict[str, bool] = json.loads(line)
        return reply

    def close(self) -> None:
        """End the child process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None


class MathVerifier:
    """1.0 when the response's final answer equals the label mathematically, else 0.0.

    An answer that takes longer than `timeout_s` seconds to judge, and a label that is no mathematics, are
    failures.
    """

    def __init__(self, workers: int | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._idle: queue.Queue[MathWorker] = queue.Queue()
        for _ in range(workers or max(1, min(8, (os.cpu_count() or 1) // 2))):
            self._idle.put(MathWorker())

    async def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        return list(await asyncio.gather(*(asyncio.to_thread(self._judge, sample) for sample in samples)))

    def close(self) -> None:
        """End the child processes; the next call starts them again."""
        workers = [self._idle.get() for _ in range(self._idle.qsize())]
        for worker in workers:
            worker.close()
            self._idle.put(worker)

    def _judge(self, sample: Sample) -> Outcome:
        assert sample.label is not None
        worker = self._idle.get()
        try:
            reply = worker.ask({"response": sample.response, "label": sample.label}, self._timeout_s)
        except WorkerTimeout:
            tail = sample.response[-200:]
            return RewardFailure("timeout", f"no verdict in {self._timeout_s:g} s on the answer …{tail!r}")
        finally:
            self._idle.put(worker)
        if "bad_label" in reply:
            return RewardFailure("bad_label", f"math-verify cannot read the label {sample.label!r}")
        return float(reply["correct"])


def _read_line(descriptor: int, timeout_s: float) -> bytes:
    """One line from a pipe, empty when the other side has closed it."""
    deadline = time.monotonic() + timeout_s
    line = b""
    readable = select.poll()  # select() takes no descriptor above 1,023
    readable.register(descriptor, select.POLLIN)
    while not line.endswith(b"\n"):
        if not readable.poll(1000 * max(0.0, deadline - time.monotonic())):
            raise WorkerTimeout
        chunk = os.read(descriptor, 65536)
        if not chunk:
            return b""
        line += chunk
    return line
