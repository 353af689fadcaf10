"""Does the reward measure what held-out prompts measure?"""

from __future__ import annotations

import statistics
from itertools import pairwise

from miles.diagnosis.finding import Evidence, Fix, FixKind, Match, Severity, Tier
from miles.diagnosis.rule import rule
from miles.diagnosis.view import RecordView
from miles.record import Series

REWARD = "rollout/raw_reward"


@rule(
    "RO5",
    "The reward rises and the evaluation does not",
    tier=Tier.DATA,
    severity=Severity.WARNING,
    symptom="over the last three evaluations the training reward pulls away from a held-out score that does "
    "not rise, by 0.1 or more",
    cause="the policy earns the reward without the skill: a leak in the verifier, or memorised prompts",
    remedy="read the samples with the highest reward; make the reward stricter; go back to the best "
    "evaluation",
    source="ours; reward hacking",
    thresholds=("hacking_evals", "hacking_gap", "hacking_noise", "mean_steps"),
)
def reward_hacking(view: RecordView) -> Match | None:
    reward = view.series(REWARD)
    for name, series in sorted(view.history.series.items()):
        if not name.startswith("eval/") or name.endswith(("-greedy", "-truncated_ratio")):
            continue
        view.asked.add(name)
        found = _pulls_away(view, reward, name, series)
        if found is not None:
            return found
    view.asked.add("eval/<name>")
    return None


def _pulls_away(view: RecordView, reward: Series, name: str, series: Series) -> Match | None:
    limits = view.thresholds
    points = [(step, score) for step, score in series if step > 0][-limits.hacking_evals - 1 :]
    trained = [_level_at(reward, step, limits.mean_steps) for step, _ in points]
    if len(points) <= limits.hacking_evals or None in trained:
        return None
    gaps = [level - score for level, (_, score) in zip(trained, points, strict=True) if level is not None]
    growing = all(b > a for a, b in pairwise(gaps))
    scores = [score for _, score in points]
    if (
        not growing
        or gaps[-1] - gaps[0] < limits.hacking_gap
        or scores[-1] > scores[0] + limits.hacking_noise
    ):
        return None
    rise = f"the reward went {trained[0]:.3f} -> {trained[-1]:.3f}"
    text = f"{name} {scores[0]:.3f} -> {scores[-1]:.3f} while {rise}"
    best = max(((score, step) for step, score in series), default=(0.0, 0))[1]
    checkpoint = view.checkpoint_before(best)
    look = Fix("read the samples with the highest reward", FixKind.MANUAL, "none")
    back = (
        ()
        if checkpoint is None
        else (
            Fix(
                "go back to before the best evaluation, with a stricter reward",
                FixKind.RESUME,
                "steps since then are computed again",
                from_step=checkpoint,
            ),
        )
    )
    return Match(points[0][0], (Evidence(text, name, tuple(points)),), (look, *back))


def _level_at(series: Series, step: int, width: int) -> float | None:
    """Mean of the last `width` values up to `step`."""
    values = [v for s, v in series if s <= step][-width:]
    return statistics.fmean(values) if len(values) == width else None


RULES = (reward_hacking,)
