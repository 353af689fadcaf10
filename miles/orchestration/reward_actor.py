"""What runs inside a reward worker's process. It starts in a quarter of the time of one that loads torch, and
holds a fraction of its memory; a reward function of the user's may load what it likes.
"""

from __future__ import annotations

from collections.abc import Sequence

from miles.data.sample import Sample
from miles.orchestration.posts import Post, take_post, whereabouts
from miles.orchestration.rewarding import failures_of, scorer_of


class RewardActor:
    """One process that judges responses."""

    def __init__(self, post: Post) -> None:
        self._record = take_post(post)
        config = post.job.resolved.config
        reward = config.reward
        self._training = scorer_of(config, reward.reward_key)
        self._evaluation = scorer_of(config, reward.eval_reward_key or reward.reward_key)

    async def ready(self) -> tuple[int, str]:
        """The process id, and the id of its node."""
        return whereabouts()

    async def score(
        self, samples: Sequence[Sample], evaluation: bool
    ) -> tuple[list[Sample], list[tuple[str, int, str]]]:
        """The samples as the reward function left them, and the rewards that could not be computed."""
        scorer = self._evaluation if evaluation else self._training
        with self._record.busy("reward"):
            report = await scorer.score(samples)
        return list(samples), failures_of(report)
