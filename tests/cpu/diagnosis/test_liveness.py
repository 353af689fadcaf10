"""Dead, silent and hanging runs, and the first real exception among many."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from miles.diagnosis import BY_ID, RecordView, diagnose
from miles.diagnosis.tracebacks import failure_of
from miles.record import History, RecordWriter, RunReader, RunStatus, summarise, write_summary
from miles.record.heartbeat import read_heartbeats

KILLED = """
    import os, signal, sys
    from miles.record import RecordWriter
    writer = RecordWriter(sys.argv[1])
    for step in range(1, 13):
        with writer.phase("rollout", step):
            writer.metrics(step, {"rollout/raw_reward": 0.5})
        if step == 10:
            writer.event("checkpoint", step=10, path="checkpoints/step-000010")
    phase = writer.phase("update_weights", 12)
    phase.__enter__()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_is_dead_with_the_phase_it_was_in_and_the_way_back(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)], check=False)
    report = diagnose(RunReader(tmp_path))
    (finding,) = report.findings
    assert (finding.rule, finding.severity, finding.step) == ("LV1", "critical", 12)
    told = " ".join(evidence.text for evidence in finding.evidence)
    assert "update_weights of step 12" in told and "is gone" in told
    assert finding.fixes[0].kind == "resume" and not finding.fixes[0].start_over


def test_a_run_that_ended_by_itself_is_not_dead(tmp_path: Path) -> None:
    history = History()
    with RecordWriter(tmp_path, history=history) as writer:
        writer.metrics(1, {"rollout/raw_reward": 0.5})
        for status in (RunStatus.FINISHED, RunStatus.STOPPED, RunStatus.INTERRUPTED):
            write_summary(tmp_path, summarise(history, status, 1.0, "x"))
            assert diagnose(RunReader(tmp_path)).findings == ()


def running_view(run: Path, **changes: float) -> RecordView:
    view = RecordView.of_run(RunReader(run))
    return replace(view, **changes)  # type: ignore[arg-type]


def test_a_process_that_exists_but_gives_no_sign_is_silent(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.metrics(1, {"rollout/raw_reward": 0.5})
        beat = read_heartbeats(tmp_path / "heartbeat")["driver"]
        assert BY_ID["LV2"].check(running_view(tmp_path, now=beat.time + 50)) is None
        finding = BY_ID["LV2"].check(running_view(tmp_path, now=beat.time + 200))
    assert finding is not None and str(os.getpid()) in finding.evidence[0].text


def test_a_phase_that_outlasts_its_past_is_a_stall_scaled_to_the_step_time(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        for step in range(1, 5):
            with writer.phase("rollout", step):
                pass
            writer.metrics(step, {"perf/step_time": 2.0})
        hanging = writer.phase("rollout", 5)
        hanging.__enter__()
        now = time.time()
        assert BY_ID["SY1"].check(running_view(tmp_path, now=now + 35)) is None  # 20 steps of 2 s
        finding = BY_ID["SY1"].check(running_view(tmp_path, now=now + 45))
        assert finding is not None and "rollout of step 5" in finding.evidence[0].text
        hanging.__exit__(None, None, None)
        assert BY_ID["SY1"].check(running_view(tmp_path, now=now + 45)) is None


def test_a_weight_sync_that_hangs_has_a_rule_of_its_own(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        for step in range(1, 5):
            with writer.phase("update_weights", step):
                pass
            writer.metrics(step, {"perf/step_time": 2.0})
        hanging = writer.phase("update_weights", 5)
        hanging.__enter__()
        view = running_view(tmp_path, now=time.time() + 45)
        finding = BY_ID["SY2"].check(view)
        assert finding is not None and "update_weights of step 5" in finding.evidence[0].text
        assert BY_ID["SY1"].check(view) is None
        assert BY_ID["SY2"].check(running_view(tmp_path, now=time.time() + 35)) is None
        hanging.__exit__(None, None, None)


def test_a_phase_without_a_past_is_never_a_stall(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.metrics(1, {"perf/step_time": 2.0})
        with writer.phase("eval", 1):
            view = running_view(tmp_path, now=time.time() + 1e6)
            assert view.history.open_phases() != [] and BY_ID["SY1"].check(view) is None


def raise_chained() -> None:
    try:
        raise ValueError("token 151936 is outside the vocabulary")
    except ValueError as error:
        raise RuntimeError("rollout failed") from error


def caught(call: Callable[[], None]) -> BaseException:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_the_first_real_exception_is_named_not_its_echo_nor_its_wrapper(tmp_path: Path) -> None:
    with RecordWriter(tmp_path, "trainer-0") as echo, RecordWriter(tmp_path, "engine-0") as engine:
        echo.exception(ConnectionResetError("peer closed"))
        engine.exception(caught(raise_chained), step=7)
        echo.exception(KeyError("later"))
    finding = BY_ID["EX1"].check(RecordView.of_run(RunReader(tmp_path)))
    assert finding is not None
    assert finding.title == "engine-0 raised ValueError" and finding.step == 7
    told = [evidence.text for evidence in finding.evidence]
    assert told[0] == "ValueError: token 151936 is outside the vocabulary"
    assert any("in raise_chained" in text for text in told)
    assert "wrapped in RuntimeError" in told
    assert finding.severity == "critical"


RAY_TRACE = """ray::Engine.generate() (pid=71, ip=10.0.0.2)
  File "/srv/engine.py", line 88, in generate
    x = table[i]
ray.exceptions.RayTaskError(IndexError): index 9 is out of bounds

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/srv/driver.py", line 12, in step
    ray.get(ref)
ray.exceptions.ActorDiedError: The actor died
"""


def test_a_remote_traceback_is_peeled_to_the_class_it_stands_for() -> None:
    failure = failure_of(
        {"type": "ActorDiedError", "message": "", "traceback": RAY_TRACE, "worker": "driver", "step": 3}
    )
    assert (failure.type, failure.message) == ("IndexError", "index 9 is out of bounds")
    assert failure.place == "/srv/engine.py:88 in generate"
    assert failure.wrapped_in == ("ActorDiedError",)


LOG = """step 3 ok
Traceback (most recent call last):
  File "/srv/train.py", line 4, in forward
    y = a @ b
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 58.00 GiB
"""


def test_a_traceback_that_only_a_log_holds_is_found_with_its_known_cause(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.metrics(3, {"rollout/raw_reward": 0.5})
        write_summary(tmp_path, summarise(writer.history or History(), RunStatus.FAILED, 1.0, "x"))
    (tmp_path / "summary.json").write_text('{"status": "failed", "attempt": 1}')
    (tmp_path / "logs" / "trainer-1.log").write_text(LOG)
    finding = BY_ID["SY10"].check(RecordView.of_run(RunReader(tmp_path)))
    assert finding is not None and finding.cause.startswith("the GPU ran out of memory")
    assert "worker trainer-1.log (trainer-1.log:2)" in [evidence.text for evidence in finding.evidence]
    assert dict(finding.fixes[0].patch) == {"training.micro_batch_size": 1}
    assert BY_ID["EX1"].check(RecordView.of_run(RunReader(tmp_path))) is None, "named once"


def test_an_exception_of_an_earlier_attempt_is_history(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.exception(ValueError("old"))
    with RecordWriter(tmp_path, attempt=2) as writer:
        writer.event("run_start")
    assert BY_ID["EX1"].check(RecordView.of_run(RunReader(tmp_path))) is None


@pytest.mark.parametrize(("status", "severity"), [("finished", "warning"), ("failed", "critical")])
def test_what_a_run_survived_is_a_warning(tmp_path: Path, status: str, severity: str) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.event("worker_dead", worker="engine-0", reason="signal 9")
        (tmp_path / "summary.json").write_text(f'{{"status": "{status}", "attempt": 1}}')
        finding = BY_ID["LV3"].check(RecordView.of_run(RunReader(tmp_path)))
    assert finding is not None and finding.severity == severity
    assert finding.evidence[0].text == "engine-0: signal 9"


@pytest.mark.parametrize(("deaths", "severity"), [(1, "warning"), (2, "critical")])
def test_a_worker_that_was_replaced_is_a_warning_while_the_run_goes_on(
    tmp_path: Path, deaths: int, severity: str
) -> None:
    with RecordWriter(tmp_path) as writer:
        for _ in range(deaths):
            writer.event("worker_dead", worker="engine-0", reason="signal 9")
        writer.event("restart", worker="engine-0", restarts=1)
        finding = BY_ID["LV3"].check(RecordView.of_run(RunReader(tmp_path)))
    assert finding is not None and finding.severity == severity


def test_why_a_lost_worker_was_not_replaced_is_evidence(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.event("worker_dead", worker="engine-0", reason="signal 9")
        writer.event("restart_failed", worker="engine-0", reason="no memory", restarts_left=2)
        finding = BY_ID["LV3"].check(RecordView.of_run(RunReader(tmp_path)))
    assert finding is not None and finding.severity == "critical"
    assert finding.evidence[1].text == "engine-0 was not started again: no memory"
