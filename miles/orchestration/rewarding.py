"""From the run file to the function that scores finished groups; rewards that are missing are recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from miles.config import RunConfig
from miles.data.sample import Sample
from miles.record import RecordWriter
from miles.rewards.outcome import RewardReport
from miles.rewards.scorer import RewardScorer, build_scorer
from miles.rollout.collect import Score


def scorer_of(config: RunConfig, reward_key: str | None) -> RewardScorer:
    """The scorer that the run file asks for."""
    reward = config.reward
    return build_scorer(
        reward.rm_type,
        reward.custom_rm_path,
        reward.group_rm,
        reward_key,
        args=config,
        rm_url=reward.rm_url,
        taught=config.distillation.use_opd,
    )


def inline_score(config: RunConfig, reward_key: str | None, record: RecordWriter) -> Score:
    """Score in this process."""
    scorer = scorer_of(config, reward_key)

    async def score(samples: Sequence[Sample]) -> list[Any]:
        failures = failures_of(await scorer.score(samples))
        record_failures(record, failures)
        return [sample.reward for sample in samples]

    return score


def failures_of(report: RewardReport) -> list[tuple[str, int, str]]:
    """Category, count and first text of the rewards that could not be computed."""
    counts = report.failure_counts()
    return [(category, counts[category], text) for category, text in report.failure_texts().items()]


def record_failures(record: RecordWriter, failures: Sequence[tuple[str, int, str]]) -> None:
    """A reward that could not be computed is an event with the first reason."""
    for category, count, text in failures:
        record.event("reward_failure", category=category, count=count, example=text)
