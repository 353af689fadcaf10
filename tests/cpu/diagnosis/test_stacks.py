"""The stacks of live workers, by py-spy or by asking the process, which is never harmed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from miles.diagnosis import diagnose, stacks
from miles.record import RunLayout, RunReader
from miles.record.heartbeat import Heartbeat

HANGS = """
    import sys, time
    from pathlib import Path
    from miles.record import RecordWriter
    from miles.record.heartbeat import read_heartbeats

    def wait_for_the_engine():
        print("ready", flush=True)
        time.sleep(900)

    with RecordWriter(sys.argv[1], heartbeat_interval=0.05) as writer:
        for step in range(1, 5):
            with writer.phase("rollout", step):
                pass
            writer.metrics(step, {"perf/step_time": 0.1})
        with writer.phase("rollout", 5):
            while read_heartbeats(Path(sys.argv[1]) / "heartbeat")["driver"].phase != "rollout":
                time.sleep(0.01)
            wait_for_the_engine()
"""


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HANGS), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


def test_a_worker_is_dumped_with_its_phase_and_goes_on(
    hanging: subprocess.Popen[str], tmp_path: Path
) -> None:
    if stacks.find_py_spy() is None:
        pytest.skip("py-spy is not installed")
    report = diagnose(RunReader(tmp_path), stacks=True)
    (stack,) = report.stacks
    assert (stack.writer, stack.pid, stack.phase) == ("driver", hanging.pid, "rollout")
    assert stack.text is not None, stack.problem
    assert "wait_for_the_engine" in stack.text
    assert hanging.poll() is None
    assert diagnose(RunReader(tmp_path)).stacks == (), "only when asked, or when something hangs"


def test_without_py_spy_the_process_writes_its_own_stacks(
    hanging: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "find_py_spy", lambda: None)
    (stack,) = diagnose(RunReader(tmp_path), stacks=True).stacks
    assert stack.text is not None and "wait_for_the_engine" in stack.text
    assert hanging.poll() is None


def test_a_process_that_does_not_handle_the_signal_never_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "find_py_spy", lambda: None)
    layout = RunLayout(tmp_path)
    layout.make()
    layout.stacks("driver").touch()
    process = subprocess.Popen(
        [sys.executable, "-c", "print('up', flush=True); import time; time.sleep(900)"],
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None and process.stdout.readline()
        beat = Heartbeat("driver", process.pid, socket.gethostname(), 1, time.time(), 5.0)
        (stack,) = stacks.dump_stacks(layout, {"driver": beat})
        assert stack.text is None and "py-spy" in stack.problem
        time.sleep(0.1)
        assert process.poll() is None, "the signal would have ended it"
    finally:
        process.kill()
        process.wait()


def test_a_worker_of_another_machine_is_named_with_the_command(tmp_path: Path) -> None:
    beat = Heartbeat("trainer-1", 4242, "node-7", 1, time.time(), 5.0)
    (stack,) = stacks.dump_stacks(RunLayout(tmp_path), {"trainer-1": beat})
    assert stack.text is None and "node-7" in stack.problem and "--pid 4242" in stack.problem


def test_a_dead_worker_has_no_stack(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    beat = Heartbeat("driver", process.pid, socket.gethostname(), 1, time.time(), 5.0, process_start="1")
    assert list(stacks.dump_stacks(RunLayout(tmp_path), {"driver": beat})) == []


def test_the_kernel_tells_which_signals_a_process_handles() -> None:
    assert stacks.handles_signal(os.getpid(), signal.SIGINT)
    assert not stacks.handles_signal(os.getpid(), signal.SIGTERM)
