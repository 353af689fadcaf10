"""A sample gets its reward, or a named reason why it has none; never a silent zero."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles.data.hooks import HookError
from miles.data.sample import Sample, SampleStatus
from miles.errors import ConfigError, DataError
from miles.rewards.boxed import last_boxed
from miles.rewards.outcome import RewardReport
from miles.rewards.scorer import RewardScorer, build_scorer


def answered(response: str, label: str | None = "42", group: int = 0, **changes: Any) -> Sample:
    sample = Sample(
        prompt="6*7=",
        tokens=[1, 2, 3],
        response=response,
        response_length=2,
        label=label,
        status=SampleStatus.COMPLETED,
        group_index=group,
    )
    for name, value in changes.items():
        setattr(sample, name, value)
    return sample


def score(scorer: RewardScorer, *samples: Sample) -> RewardReport:
    return asyncio.run(scorer.score(samples))


def custom(tmp_path: Path, body: str, **settings: Any) -> RewardScorer:
    path = tmp_path / f"reward_{abs(hash(body))}.py"
    path.write_text(body)
    return build_scorer(custom_rm_path=f"{path}:reward", **settings)


def test_exact_wants_the_label_and_an_end() -> None:
    samples = [
        answered("42"),
        answered("42 "),
        answered("41"),
        answered("42", status=SampleStatus.TRUNCATED),
    ]
    report = score(build_scorer(rm_type="exact"), *samples)
    assert report.rewards == [1.0, 0.0, 0.0, 0.0]
    assert [s.reward for s in samples] == report.rewards
    assert report.failure_counts() == {}


def test_unfinished_samples_are_not_judged() -> None:
    aborted = answered("42", status=SampleStatus.ABORTED, reward=0.5)
    report = score(build_scorer(rm_type="exact"), aborted, answered("42"))
    assert report.rewards == [None, 1.0]
    assert report.failure_counts() == {"unfinished": 1}
    assert aborted.reward is None


def test_a_label_is_required_where_it_is_compared() -> None:
    with pytest.raises(DataError, match="no label") as error:
        score(build_scorer(rm_type="exact"), answered("42", label=None))
    assert "--label-key" in error.value.fix


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{7} and \boxed{unfinished", "7"),
        (r"\boxed{never", None),
        ("42", None),
    ],
)
def test_the_last_complete_box_counts(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


def test_the_boxed_prefix_judges_the_box_only() -> None:
    samples = [answered(r"It is \boxed{42}"), answered("42"), answered(r"\boxed{43} 42")]
    assert score(build_scorer(rm_type="boxed_exact"), *samples).rewards == [1.0, 0.0, 0.0]


def test_custom_functions_get_args_and_sample(tmp_path: Path) -> None:
    for kind in ("def", "async def"):
        scorer = custom(
            tmp_path,
            f"{kind} reward(args, sample):\n    return args['w'] * len(sample.response)",
            args={"w": 2},
        )
        assert score(scorer, answered("42"), answered("421")).rewards == [4.0, 6.0]


def test_numbers_of_numpy_and_booleans_are_numbers(tmp_path: Path) -> None:
    scorer = custom(
        tmp_path,
        "import numpy as np\ndef reward(args, sample):\n"
        "    return [True, np.float32(0.5), np.int64(3)][sample.index]",
    )
    samples = [answered("x", index=i) for i in range(3)]
    assert score(scorer, *samples).rewards == [1.0, 0.5, 3.0]
    assert all(type(s.reward) is float for s in samples)
    assert not isinstance(samples[1].reward, np.generic)


def test_a_missing_or_non_finite_reward_is_a_failure_not_zero(tmp_path: Path) -> None:
    scorer = custom(
        tmp_path,
        "def reward(args, sample):\n    return [None, float('nan'), float('inf'), 1.0][sample.index]",
    )
    samples = [answered("x", index=i) for i in range(4)]
    report = score(scorer, *samples)
    assert report.rewards == [None, None, None, 1.0]
    assert report.failure_counts() == {"no_reward": 1, "non_finite": 2}
    assert "gave None" in report.failure_texts()["no_reward"]
    assert ".py:1" in report.failure_texts()["no_reward"]
    assert [s.reward for s in samples] == [None, None, None, 1.0]


def test_reward_key_selects_from_a_dict(tmp_path: Path) -> None:
    body = "def reward(args, sample):\n    return {'accuracy': sample.index, 'format': None}"
    sample = answered("x", index=1)
    assert score(custom(tmp_path, body, reward_key="accuracy"), sample).rewards == [1.0]
    assert sample.reward == {"accuracy": 1, "format": None}
    report = score(custom(tmp_path, body, reward_key="format"), sample)
    assert (report.rewards, report.failure_counts()) == ([None], {"no_reward": 1})
    assert sample.reward is None
    for key in (None, "speed"):
        with pytest.raises(DataError, match="accuracy, format"):
            score(custom(tmp_path, body, reward_key=key), sample)


def test_groups_are_judged_together(tmp_path: Path) -> None:
    body = (
        "def reward(args, samples):\n"
        "    best = max(len(s.response) for s in samples)\n"
        "    return [len(s.response) == best for s in samples]"
    )
    samples = [answered("aa"), answered("a"), answered("b", group=1), answered("bbb", group=1)]
    assert score(custom(tmp_path, body, group_rm=True), *samples).rewards == [1.0, 0.0, 0.0, 1.0]
    short = custom(tmp_path, "def reward(args, samples):\n    return [1.0]", group_rm=True)
    with pytest.raises(HookError, match="returned 1 rewards for a group of 2"):
        score(short, *samples)
    scalar = custom(tmp_path, "def reward(args, samples):\n    return 1.0", group_rm=True)
    with pytest.raises(HookError, match="returned float for a group of 2"):
        score(scalar, *samples)


def test_a_failing_function_ends_the_run_with_its_place(tmp_path: Path) -> None:
    scorer = custom(tmp_path, "def reward(args, sample):\n    return 1 / (sample.index - 1)")
    with pytest.raises(HookError, match="ZeroDivisionError") as error:
        score(scorer, answered("x", index=0), answered("x", index=1))
    assert ".py:2, in reward" in error.value.where


def test_or_marks_its_samples_by_policy(tmp_path: Path) -> None:
    scorer = custom(tmp_path, "def reward(args, sample):\n    return 1 / sample.index", on_error="mark")
    samples = [answered("x", index=0), answered("x", index=1)]
    report = score(scorer, *samples)
    assert report.rewards == [None, 1.0]
    assert report.failure_counts() == {"exception": 1}
    assert "ZeroDivisionError" in report.failure_texts()["exception"]
    assert [s.status for s in samples] == [SampleStatus.FAILED, SampleStatus.COMPLETED]


def test_something_that_is_no_reward_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HookError, match="not str") as error:
        score(custom(tmp_path, "def reward(args, sample):\n    return '1.0'"), answered("x"))
    assert ".py:1" in error.value.where


def test_a_run_without_a_judge_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing judges"):
        build_scorer()
    with pytest.raises(ConfigError, match="--rm-type math"):
        build_scorer(rm_type="maths")
    with pytest.raises(ConfigError, match="--group-rm without"):
        build_scorer(rm_type="exact", group_rm=True)


def test_sync_functions_stay_in_the_callers_thread(tmp_path: Path) -> None:
    body = "import threading\ndef reward(args, sample):\n    return threading.get_ident() == args"
    scorer = custom(tmp_path, body, args=threading.get_ident())
    assert score(scorer, answered("x")).rewards == [1.0]
