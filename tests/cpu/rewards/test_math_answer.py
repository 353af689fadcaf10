"""Mathematical equality, judged by the real math-verify library in a child process."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from miles.data.sample import Sample, SampleStatus
from miles.errors import Unavailable
from miles.rewards import math_answer
from miles.rewards.boxed import boxed
from miles.rewards.math_answer import MathVerifier
from miles.rewards.outcome import Outcome, RewardFailure


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    made = MathVerifier(workers=1)
    yield made
    made.close()


def answered(response: str, label: str) -> Sample:
    return Sample(
        prompt="?",
        tokens=[1, 2],
        response=response,
        response_length=1,
        label=label,
        status=SampleStatus.COMPLETED,
    )


def judge(verifier: MathVerifier, *pairs: tuple[str, str]) -> list[Outcome]:
    return asyncio.run(verifier([answered(response, label) for response, label in pairs]))


CASES = [
    (r"The answer is \boxed{42}.", "42", 1.0),
    (r"The answer is \boxed{43}.", "42", 0.0),
    (r"Thus $x = \frac{1}{2}$", r"\frac{1}{2}", 1.0),
    (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
    (r"\boxed{\frac{2}{4}}", "0.5", 1.0),
    (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", 1.0),
    (r"\boxed{1{,}234}", "1234", 1.0),
    (r"\boxed{x^2 + 2x + 1}", r"(x+1)^2", 1.0),
    (r"\boxed{\{2, 1\}}", r"\{1, 2\}", 1.0),
    (r"\boxed{(1, 2)}", "(2, 1)", 0.0),
    (r"Both \boxed{7} and \boxed{42}", r"\{7, 42\}", 1.0),
    (r"First \boxed{7}, no: \boxed{42}", "42", 0.0),
    ("I do not know", "42", 0.0),
    ("", "42", 0.0),
]


def test_answers_are_compared_as_mathematics(verifier: MathVerifier) -> None:
    outcomes = judge(verifier, *((response, label) for response, label, _ in CASES))
    assert outcomes == [expected for *_, expected in CASES]


def test_the_boxed_prefix_takes_the_last_of_several_boxes(verifier: MathVerifier) -> None:
    sample = answered(r"First \boxed{7}, no: \boxed{42}", "42")
    assert asyncio.run(boxed(verifier)([sample])) == [1.0]


def test_it_works_outside_the_main_thread(verifier: MathVerifier) -> None:
    found: list[Outcome] = []
    thread = threading.Thread(target=lambda: found.extend(judge(verifier, (r"\boxed{42}", "42"))))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_a_label_that_is_no_mathematics_is_a_failure(verifier: MathVerifier) -> None:
    (outcome,) = judge(verifier, (r"\boxed{1}", " "))
    assert isinstance(outcome, RewardFailure)
    assert outcome.category == "bad_label"


def test_an_endless_answer_is_a_timeout_and_the_next_one_is_judged() -> None:
    verifier = MathVerifier(workers=1, timeout_s=0.5)
    try:
        assert judge(verifier, (r"\boxed{42}", "42")) == [1.0]
        started = time.monotonic()
        endless, after = judge(verifier, (r"\boxed{10^{10^{10}}}", "7"), (r"\boxed{42}", "42"))
        assert isinstance(endless, RewardFailure)
        assert endless.category == "timeout"
        assert after == 1.0
        assert time.monotonic() - started < 300
    finally:
        verifier.close()


def test_it_works_beside_any_number_of_open_files() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] < 2048:
        pytest.skip("this machine allows fewer files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 2048), limits[1]))
    read, write = os.pipe()
    high = fcntl.fcntl(read, fcntl.F_DUPFD, 1024)
    try:
        os.write(write, b"a line\n")
        assert math_answer._read_line(high, timeout_s=60) == b"a line\n"
        with pytest.raises(math_answer.WorkerTimeout):
            math_answer._read_line(high, timeout_s=0.01)
        os.close(write)
        assert math_answer._read_line(high, timeout_s=60) == b""
    finally:
        os.close(read)
        os.close(high)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_child_that_dies_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_answer, "_COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    with pytest.raises(Unavailable, match="ended with code 3"):
        judge(MathVerifier(workers=1), ("1", "1"))


def test_importing_the_rewards_does_not_import_sympy() -> None:
    heavy = "{'sympy', 'math_verify', 'torch'}"
    code = f"import sys, miles.rewards.scorer; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
