"""One SGLang server as a process of ours: started on a free loopback port, watched, ended by its own pid."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from itertools import islice
from pathlib import Path

from miles import environment
from miles.errors import Unavailable
from miles.http_client import ConnectionLost, HttpClient
from miles.rollout.sglang.command import ServerOptions, command_line

LOOPBACK = "127.0.0.1"
PORTS = range(20_000, 32_000)
"""Below those that Linux and macOS give out by themselves."""
_DRAW = random.SystemRandom()
POLL_S = 0.25
LAST_LINES = 12


class ServerProcess:
    """A server and the processes it started, which share a process group of their own."""

    def __init__(self, options: ServerOptions) -> None:
        """Start it; `wait_ready` returns when it answers. Raises Unavailable when it cannot be executed."""
        self.options = options
        self.port, meeting = free_ports(2)
        self.url = f"http://{LOOPBACK}:{self.port}"
        options.log.parent.mkdir(parents=True, exist_ok=True)
        # What it writes before its log is read begins here; a restarted server goes on in the same file.
        self._log_start = options.log.stat().st_size if options.log.exists() else 0
        with options.log.open("ab") as log:
            try:
                self._process = subprocess.Popen(
                    command_line(options, LOOPBACK, self.port, meeting),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment.of_child(options.environment),
                    start_new_session=True,
                )
            except OSError as error:
                raise Unavailable(
                    "no SGLang server can be started", where=str(options.python), why=str(error.strerror)
                ) from error

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> str | None:
        """How the process ended; None while it lives."""
        code = self._process.poll()
        if code is None:
            return None
        return f"its process ended by signal {-code}" if code < 0 else f"its process ended with status {code}"

    async def wait_ready(self, timeout: float) -> None:
        """Return when the server answers a health check, which generates a token.

        Raises: Unavailable when it ends, or does not answer in time.
        """
        client, deadline = HttpClient(self.url), time.monotonic() + timeout
        while True:
            if self.ended is not None:
                raise self._failed(self.ended)
            if time.monotonic() > deadline:
                self.kill()
                raise self._failed(f"it did not answer within {timeout:g} s")
            try:
                if (await client.get("/health", timeout=max(deadline - time.monotonic(), POLL_S))).ok:
                    return
            except ConnectionLost:
                pass
            await asyncio.sleep(POLL_S)

    def _failed(self, reason: str) -> Unavailable:
        said = last_lines(self.options.log, self._log_start)
        return Unavailable(
            f"the SGLang server did not start: {reason}",
            where=str(self.options.log),
            why=said or "it printed nothing",
            fix="the whole log is in that file",
        )

    def kill(self) -> None:
        """End it and all it started at once; ending a dead one does nothing. A server has nothing to save."""
        # The whole group: workers of a server that was killed may still be there.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on now.

    A server listens a minute after it was told its port. One that the system gives out by itself may then be
    the near end of somebody's connection, so it is not one of those.
    """
    found = list(islice((port for port in _DRAW.sample(PORTS, len(PORTS)) if _is_free(port)), count))
    if len(found) < count:
        asked = f"{LOOPBACK}:{PORTS.start} to {PORTS.stop - 1}"
        raise Unavailable("no free ports for an SGLang server", where=asked)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def last_lines(log: Path, start: int) -> str:
    """The end of what was printed since `start`: from its last error on, where it names one."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - 16384))
        lines = [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if "Error" in line]
    return "\n".join(lines[errors[-1] :][:2] if errors else lines[-LAST_LINES:])
