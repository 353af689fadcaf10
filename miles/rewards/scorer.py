"""The scorer: gives finished samples their rewards and says which ones got none, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from miles.data.hooks import HookError, hook_place, load_hook
from miles.data.sample import Sample, SampleStatus
from miles.errors import ConfigError, DataError, MilesError
from miles.rewards.custom import ErrorPolicy, per_group, per_sample
from miles.rewards.outcome import Outcome, RewardFailure, RewardReport, Verifier
from miles.rewards.registry import WITHOUT_LABEL, built_in_verifier

JUDGED = (SampleStatus.COMPLETED, SampleStatus.TRUNCATED)


class RewardScorer:
    """One verifier and how its outcome becomes a scalar."""

    def __init__(
        self,
        verifier: Verifier,
        reward_key: str | None = None,
        needs_label: bool = False,
        source: str = "the reward function",
    ) -> None:
        """`source` names the verifier in messages: its flag value, or file and line."""
        self._verifier = verifier
        self._reward_key = reward_key
        self._needs_label = needs_label
        self._source = source

    async def score(self, samples: Sequence[Sample]) -> RewardReport:
        """Set `reward` on every sample and report the scalars.

        Only completed and truncated samples are judged. A reward that is missing or not finite is a failure
        and leaves `reward` None, never zero. Raises DataError for a missing label or reward key, HookError
        when a user function raises or returns something that is no reward.
        """
        # Decided before judging: a failing function may change a sample's status.
        finished = [sample.status in JUDGED for sample in samples]
        judged = [sample for sample, is_finished in zip(samples, finished, strict=True) if is_finished]
        if self._needs_label:
            for sample in judged:
                _require_label(sample, self._source)
        outcomes = iter(await self._verifier(judged) if judged else [])
        rewards: list[float | None] = []
        failures: list[RewardFailure | None] = []
        for sample, is_finished in zip(samples, finished, strict=True):
            outcome = next(outcomes) if is_finished else _unfinished(sample)
            reward, failure = self._settle(sample, outcome)
            rewards.append(reward)
            failures.append(failure)
        return RewardReport(rewards, failures)

    def _settle(self, sample: Sample, outcome: Outcome) -> tuple[float | None, RewardFailure | None]:
        """Store the outcome on the sample; the scalar, or why there is none."""
        sample.reward = None
        if isinstance(outcome, RewardFailure):
            return None, outcome
        if outcome is not None:
            sample.reward = self._checked(outcome)
        value = sample.reward_value(self._reward_key)
        if value is not None and math.isfinite(value):
            return value, None
        sample.reward = None
        if value is None:
            return None, RewardFailure("no_reward", f"{self._source} gave None")
        return None, RewardFailure("non_finite", f"{self._source} gave {value}")

    def _checked(self, outcome: Any) -> float | dict[str, Any]:
        if isinstance(outcome, dict):
            return outcome
        if isinstance(outcome, bool | int | float | np.number | np.bool_):
            return float(outcome)
        raise HookError(
            f"a reward is a number, a dict or None, not {type(outcome).__name__}",
            where=self._source,
            fix="return float(...)",
        )


def build_scorer(
    rm_type: str | None = None,
    custom_rm_path: str | None = None,
    group_rm: bool = False,
    reward_key: str | None = None,
    args: Any = None,
    rm_url: str | None = None,
    taught: bool = False,
    on_error: ErrorPolicy = "raise",
) -> RewardScorer:
    """The scorer of a run. A custom function wins over `rm_type`, which it may read from `args`.

    `args` is what the custom function gets as its first argument: the run's configuration. A run that is
    `taught` needs neither: all rewards are 0 then. Raises ConfigError
    when neither is given or the name is unknown, HookError when the function cannot be loaded.
    """
    if custom_rm_path:
        hook = load_hook(custom_rm_path, "--custom-rm-path")
        verifier = (per_group if group_rm else per_sample)(hook, args, on_error)
        return RewardScorer(verifier, reward_key, source=hook_place(hook))
    if group_rm:
        raise ConfigError(
            MilesError(
                "--group-rm without a function that judges groups",
                where="[reward] group_rm",
                why="the built-in verifiers judge every response by itself",
                fix="add --custom-rm-path path/to/file.py:function, or take --group-rm away",
            )
        )
    if not rm_type and taught:
        return RewardScorer(no_reward, reward_key, source="no reward function: the teacher alone")
    if not rm_type:
        raise ConfigError(
            MilesError(
                "nothing judges the responses",
                where="[reward]",
                fix="--rm-type exact, --rm-type math, or --custom-rm-path path/to/file.py:function",
            )
        )
    verifier = built_in_verifier(rm_type, rm_url)
    return RewardScorer(verifier, reward_key, rm_type not in WITHOUT_LABEL, f"--rm-type {rm_type}")


async def no_reward(samples: Sequence[Sample]) -> list[Outcome]:
    """0.0 for everybody: a teacher alone says what was good."""
    return [0.0] * len(samples)


def _unfinished(sample: Sample) -> RewardFailure:
    return RewardFailure("unfinished", f"the sample is {sample.status.value}")


def _require_label(sample: Sample, source: str) -> None:
    if sample.label is None:
        raise DataError(
            "the prompt has no label to compare with",
            where=f"sample {sample.index} (group {sample.group_index})",
            why=f"{source} needs one",
            fix="name the column of the answers with --label-key",
        )
