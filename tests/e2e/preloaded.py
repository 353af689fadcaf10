"""Programs that tests start hundreds of times, as forks of a process that has imported what they import.

A program has a process of its own, a child of the test's, with nothing but its own environment, directory and
streams, as if it had been started. What a real start loads and costs is measured by `test_startup`.

As a program, `preloaded.py FD MODULE...`: a message on the socket is JSON (program, words, directory,
environment) with the descriptors of stdin, stdout and stderr; the answers are the id of the new process and
its adoption.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

REPOSITORY = Path(__file__).parents[2]
MILES = REPOSITORY / "miles_cli" / "__main__.py"
PLANS = (
    "miles_cli.main",
    "miles_cli.commands.train",
    "miles_cli.plan_view",
    "miles_cli.init.session",
    "miles.config.reference",
    "miles.planning",
)
RUNS = (*PLANS, "miles.orchestration.launch", "miles.training.native.trainer", "miles.rollout.native.engine")
MEGATRON = (
    "miles.training.megatron.trainer",
    "megatron.core.models.gpt",
    "megatron.core.distributed",
    "megatron.core.optimizer",
)
MEGATRON_RUNS = (*RUNS, *MEGATRON)
PR_SET_CHILD_SUBREAPER = 36
THREADS = "1"
"""Of each process: what the plan of a small run says, and what a process that forks must have."""
LIMIT = 1 << 17
"""Bytes of a message."""
UNREAD = 1 << 20
"""Bytes that a program may write before somebody reads them: a run that writes more waits."""


class Pause(NamedTuple):
    """Where a process stops by itself (SIGSTOP): before this call, counted from 1, of a method."""

    module: str
    method: str
    """As `Class.name`."""
    call: int


class Preloaded(subprocess.Popen[str]):
    """A Python program after these imports. Linux only: elsewhere nobody can adopt a grandchild."""

    def __init__(
        self,
        imported: Sequence[str],
        program: Path,
        words: Sequence[str],
        env: Mapping[str, str],
        pause: Pause | None = None,
        **how: Any,
    ) -> None:
        self._imported, self._program, self._pause = tuple(imported), program, pause
        super().__init__(words, env=env, text=True, **{"stdin": subprocess.DEVNULL, **how})

    def _execute_child(self, words: Any, *how: Any) -> None:  # type: ignore[override]
        directory, environment, pipes = how[4], how[5], how[9:15]
        stdin, _, _, stdout, _, stderr = pipes
        call = {
            "program": str(self._program),
            "words": [str(word) for word in words],
            "directory": str(directory or Path.cwd()),
            "environment": dict(environment),
            "pause": self._pause,
        }
        inherited = enumerate((stdin, stdout, stderr))
        streams = tuple(number if stream == -1 else stream for number, stream in inherited)
        self.pid = _fork(_server(self._imported), json.dumps(call).encode(), streams)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def miles(
    words: Sequence[str],
    env: Mapping[str, str],
    cwd: Path | None = None,
    imported: Sequence[str] = RUNS,
    pause: Pause | None = None,
) -> Preloaded:
    """`miles WORDS` with its output in pipes."""
    pipe = subprocess.PIPE
    how = {"cwd": cwd, "stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe, "pipesize": UNREAD}
    return Preloaded(imported, MILES, words, env, pause, **how)


def _fork(server: socket.socket, call: bytes, streams: tuple[int, ...]) -> int:
    """The id of a new process. It is a child of this one, which adopts what the server leaves behind."""
    assert len(call) < LIMIT
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    socket.send_fds(server, [call], streams)
    pid, ready = server.recv(32), server.recv(32)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0)
    assert ready, "the process that has imported everything is gone"
    return int(pid)


@cache
def _server(imported: tuple[str, ...]) -> socket.socket:
    """The way to the process that has imported these; it ends when this one does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {**os.environ, "OMP_NUM_THREADS": THREADS, "PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, "-W", "ignore", __file__, str(theirs.fileno()), *imported]
    subprocess.Popen(words, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)
    theirs.close()
    return ours


def serve(channel: socket.socket) -> dict[str, Any] | None:
    """Fork until nobody can ask any more: None. In a fork: what it was asked to run."""
    while True:
        message, streams, _, _ = socket.recv_fds(channel, LIMIT, 3)
        if not message:
            return None
        between = os.fork()
        if between == 0:
            child = os.fork()
            if child == 0:
                channel.close()
                call: dict[str, Any] = json.loads(message)
                settle(call, streams)
                return call
            channel.send(str(child).encode())
            os._exit(0)
        for stream in streams:
            os.close(stream)
        os.waitpid(between, 0)
        channel.send(b"adopted")


def settle(call: Mapping[str, Any], streams: Sequence[int]) -> None:
    """Take the streams, the directory, the environment and the words of a program."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(call["directory"])
    os.environ.clear()
    os.environ.update(call["environment"])
    # As `python -m` and the paths of this environment would have it.
    further = os.environ.get("PYTHONPATH")
    sys.path[:1] = [call["directory"], *(further.split(os.pathsep) if further else ())]
    sys.argv = [call["program"], *call["words"]]


def pause_at(module: str, method: str, call: int) -> None:
    """Stop before that call, until somebody continues or ends this process."""
    owner_name, name = method.split(".")
    owner = getattr(import_module(module), owner_name)
    original, calls = getattr(owner, name), count(1)

    def paused(*args: Any, **options: Any) -> Any:
        if next(calls) == call:
            # To this thread: sent to the process, another one may take it while this one goes on.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        return original(*args, **options)

    setattr(owner, name, paused)


def run(program: str) -> int:
    """Run it until its end; its exit code."""
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as ending:
        return int(ending.code or 0)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    return 0


def leave(code: int) -> None:
    """End as the interpreter ends, but for taking apart module by module what a fork shares."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def accept_torch() -> None:
    """Let a run start with torch loaded, where that was under the environment that its plan exports."""
    from miles_cli import session

    prepare = session.prepare

    def prepared(plan: Any) -> None:
        assert dict(plan.exports).get("OMP_NUM_THREADS", THREADS) == THREADS, "start this run for real"
        with patch.dict(sys.modules):
            sys.modules.pop("torch", None)
            prepare(plan)

    session.prepare = prepared


if __name__ == "__main__":
    for name in sys.argv[2:]:
        import_module(name)
    accept_torch()
    gc.freeze()
    called = serve(socket.socket(fileno=int(sys.argv[1])))
    if called is not None:
        if called["pause"]:
            pause_at(*called["pause"])
        leave(run(called["program"]))
