"""The reward on two rows before any run: the expected answer must score 1, an empty one 0."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from miles.config import RunConfig
from miles.data.sample import Sample, SampleStatus
from miles.errors import MilesError
from miles_cli.init.world import DataLook


@dataclass(frozen=True)
class RewardTrial:
    """What the smoke test saw. `passed` is None where it could not be made."""

    passed: bool | None
    lines: tuple[str, ...]

    def __str__(self) -> str:
        verdict = {True: "works", False: "fails", None: "not tested"}[self.passed]
        return " · ".join((verdict, *self.lines))


def try_reward(config: RunConfig, data: DataLook | None) -> RewardTrial:
    """Score two labels against themselves and two empty responses, with the reward of this run.

    A built-in verifier must give exactly 1 and 0; a function of the user's must tell the two apart.
    """
    from miles.rewards.scorer import build_scorer

    reward = config.reward
    rows = [(prompt, label) for prompt, label in (data.examples if data else ()) if label is not None]
    if not rows or not (reward.rm_type or reward.custom_rm_path):
        return RewardTrial(None, ("not made: it needs a reward and rows with an expected answer",))
    samples = [
        _sample(prompt, label, text)
        for prompt, label in rows
        for text in (_written(reward.rm_type, label), "")
    ]
    try:
        scorer = build_scorer(
            reward.rm_type, reward.custom_rm_path, reward.group_rm, reward.reward_key, args=config
        )
        report = asyncio.run(scorer.score(samples))
    except MilesError as error:
        return RewardTrial(False, (error.in_one_line,))
    exact = not reward.custom_rm_path
    verdicts = [
        _verdict(label, report.rewards[2 * i], report.rewards[2 * i + 1], exact)
        for i, (_, label) in enumerate(rows)
    ]
    failures = tuple(dict.fromkeys(f.text for f in report.failures if f is not None))
    return RewardTrial(all(passed for passed, _ in verdicts), (*(line for _, line in verdicts), *failures))


def _sample(prompt: str, label: str, response: str) -> Sample:
    return Sample(prompt=prompt, label=label, response=response, status=SampleStatus.COMPLETED)


def _written(rm_type: str | None, label: str) -> str:
    """The expected answer as a response gives it: mathematics stands in a box unless the label has one."""
    if rm_type is None or not ("math" in rm_type or rm_type.startswith("boxed_")) or "\\boxed" in label:
        return label
    return f"\\boxed{{{label}}}"


def _verdict(label: str, own: float | None, empty: float | None, exact: bool) -> tuple[bool, str]:
    """Whether one row passed, and how it is said."""
    passed = own is not None and empty is not None and (own, empty) == (1, 0)
    if not exact:
        passed = own is not None and empty is not None and own > empty
    shown = label if len(label) <= 24 else label[:23] + "…"
    return passed, f"{shown!r} scores {_number(own)}, no answer {_number(empty)}"


def _number(reward: float | None) -> str:
    return "no reward" if reward is None else f"{reward:g}"
