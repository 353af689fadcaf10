"""Bare logs: what was raised first, under Ray's wrappers, and lines that name a failure by themselves."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from miles.diagnosis import RecordView, assess
from miles.diagnosis.known_texts import KNOWN_TEXTS
from miles.diagnosis.logs import find_logs, scan_logs
from miles.diagnosis.ray_text import split_line
from miles.record import History

RAY = Path(__file__).parent / "logs"
"""Logs of real drivers (Ray 2.60), with other paths."""


def view_of(*paths: Path) -> RecordView:
    return RecordView(History(), status=None, foreign=True, whole=True, log_files=paths)


def findings(*paths: Path) -> dict[str, str]:
    """Title and evidence by rule."""
    told = assess(view_of(*paths))
    return {f.rule: " | ".join([f.title, *(evidence.text for evidence in f.evidence)]) for f in told}


def test_a_failed_task_of_a_task_is_peeled_to_the_remote_exception() -> None:
    found = findings(RAY / "ray_task.log")
    assert list(found) == ["EX1"]
    assert found["EX1"].startswith("Engine.generate (pid 19569 on 192.0.2.2) raised IndexError")
    assert "IndexError: list index out of range" in found["EX1"]
    assert "/srv/job/die.py:5 in generate" in found["EX1"]
    assert "Ray" not in found["EX1"], "wrappers are peeled off"


def test_an_actor_that_fails_to_start_is_named_with_its_own_exception() -> None:
    found = findings(RAY / "ray_init.log")
    assert "Broken.__init__ (pid 20959 on 192.0.2.2) raised RuntimeError" in found["EX1"]
    assert "RuntimeError: no weights here" in found["EX1"] and "ActorDiedError" in found["EX1"]
    assert "LV3" not in found


@pytest.mark.parametrize("log", ["ray_kill.log", "ray_exit.log"])
def test_a_killed_actor_is_dead_and_its_caller_only_an_echo(log: str) -> None:
    found = findings(RAY / log)
    assert re.search(
        r"Engine \(pid \d+ on 192.0.2.2\): SYSTEM_ERROR: Worker unexpectedly exits", found["LV3"]
    )
    assert found["LV3"].count("pid") == 1, "the raylet's notice and the caller's are one death"


def test_lines_of_many_workers_in_one_log_are_taken_apart(tmp_path: Path) -> None:
    log = tmp_path / "driver.log"
    log.write_text(
        "\x1b[36m(Trainer pid=7, ip=10.0.0.1)\x1b[0m Traceback (most recent call last):\n"
        "\x1b[36m(Engine pid=9)\x1b[0m all is well\n"
        '\x1b[36m(Trainer pid=7, ip=10.0.0.1)\x1b[0m   File "/srv/t.py", line 3, in step\n'
        "\x1b[36m(Engine pid=9)\x1b[0m Traceback is a word [repeated 3x across cluster]\n"
        "\x1b[36m(Trainer pid=7, ip=10.0.0.1)\x1b[0m KeyError: 'reward'\n"
    )
    (failure,) = scan_logs([log]).failures
    assert (failure.type, failure.worker, failure.place) == (
        "KeyError",
        "Trainer pid=7",
        "/srv/t.py:3 in step",
    )
    assert split_line("(a remark) of a human") == ("", "(a remark) of a human")
    assert split_line("[rank3]: boom") == ("rank3", "boom")


def test_the_earliest_real_exception_over_several_files_wins(tmp_path: Path) -> None:
    def log(name: str, clock: str, error: str) -> Path:
        path = tmp_path / name
        path.write_text(
            f"2026-11-24 {clock} step 3\nTraceback (most recent call last):\n"
            f'  File "/srv/{name}.py", line 1, in run\n    go()\n{error}\n'
        )
        return path

    logs = [
        log("a.log", "10:00:09", "ValueError: late"),
        log("b.log", "10:00:05", "KeyError: 'first'"),
        log("c.log", "10:00:01", "ConnectionResetError: an echo, though printed first"),
    ]
    assert "KeyError: 'first'" in findings(*logs)["EX1"]


def test_a_chain_names_the_cause_and_its_wrappers(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text(
        'Traceback (most recent call last):\n  File "a.py", line 1, in inner\n'
        "ZeroDivisionError: division by zero\n"
        "\nThe above exception was the direct cause of the following exception:\n\n"
        'Traceback (most recent call last):\n  File "b.py", line 2, in outer\nqueue.Empty\nafterwards\n'
    )
    (failure,) = scan_logs([log]).failures
    assert failure.type == "ZeroDivisionError" and failure.wrapped_in == ("Empty",)


RAISED = 'Traceback (most recent call last):\n  File "/srv/{file}", line 5, in {function}\n    x()\n{error}\n'
TEXTS = {
    "SY3": "[rank2]:[E ProcessGroupNCCL.cpp:616] [Rank 2] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=91, OpType=ALLREDUCE, NumelIn=1, Timeout(ms)=600000) ran for 600012 milliseconds",
    "SY10": RAISED.format(
        file="loss.py", function="forward", error="torch.OutOfMemoryError: CUDA out of memory."
    ),
    "SY11": RAISED.format(
        file="actor.py", function="wake_up", error="torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB"
    ),
    "SY12": RAISED.format(
        file="model_runner.py",
        function="init",
        error="RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.",
    ),
    "SY13": RAISED.format(
        file="a.py", function="b", error="RuntimeError: CUDA error: an illegal memory access was encountered"
    ),
    "SY14": "(raylet) 3 Workers (tasks / actors) killed due to memory pressure (OOM), 0 Workers crashed",
    "SY15": "(autoscaler) Error: No available node types can fulfill resource request {'GPU': 16.0}",
    "SY16": RAISED.format(
        file="torch/_inductor/codecache.py",
        function="load",
        error="json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
    ),
    "SY20": "OSError: [Errno 28] No space left on device: '/data/iter_20'",
}


@pytest.mark.parametrize("rule", sorted(TEXTS))
def test_a_telling_text_is_named_with_worker_and_line(rule: str, tmp_path: Path) -> None:
    log = tmp_path / "worker-2.log"
    log.write_text(f"step 1 done\n{TEXTS[rule]}\n")
    found = findings(log)
    assert list(found) == [rule], "one failure is one finding"
    assert "worker-2.log:2" in found[rule]


def test_every_known_text_has_a_case() -> None:
    assert set(TEXTS) == {known.rule for known in KNOWN_TEXTS}


def test_a_collective_that_timed_out_is_the_echo_of_a_real_failure(tmp_path: Path) -> None:
    (tmp_path / "rank0.log").write_text(TEXTS["SY3"])
    (tmp_path / "rank1.log").write_text(TEXTS["SY10"])
    assert list(findings(*find_logs(tmp_path))) == ["SY10"]


def test_among_telling_lines_the_cause_comes_before_its_echo(tmp_path: Path) -> None:
    (tmp_path / "rank0.log").write_text(f"2026-11-24 10:00:00 x\n{TEXTS['SY3']}\n")
    (tmp_path / "rank1.log").write_text(f"2026-11-24 10:30:00 y\n{TEXTS['SY20']}\n")
    assert list(findings(*find_logs(tmp_path))) == ["SY20"]


def test_a_telling_line_comes_before_an_exception_that_is_only_an_echo(tmp_path: Path) -> None:
    echo = RAISED.format(file="a.py", function="b", error="ConnectionResetError: peer closed")
    (tmp_path / "rank0.log").write_text(echo)
    (tmp_path / "node.log").write_text(TEXTS["SY14"])
    found = findings(*find_logs(tmp_path))
    assert list(found) == ["SY14"] and "ConnectionResetError" in found["SY14"]


def test_ordinary_logs_are_quiet(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("step 1\nno Error so far, JSONDecodeError retries: 0\n" * 50)
    assert findings(*find_logs(tmp_path)) == {}


def test_only_logs_are_read_and_a_torn_one_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"Traceback (most recent call last):")
    (tmp_path / "torn.err").write_bytes(b"\xff\xfeTraceback (most recent call last):\n  File")
    os.mkdir(tmp_path / "deep")
    (tmp_path / "deep" / "w.out").write_text("x")
    assert [path.name for path in find_logs(tmp_path)] == ["w.out", "torn.err"]
    assert scan_logs(find_logs(tmp_path)).failures == []


def test_the_last_words_of_every_worker_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("step 7\nentering update_weights\n\n")
    (word,) = scan_logs([tmp_path / "a.log"]).last_words
    assert (word.text, word.log) == ("entering update_weights", "a.log:2")
