"""What one rollout looked like: the `rollout/…` metrics that need nothing but its samples."""

from __future__ import annotations

import math
import statistics
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import zip_longest

from miles.data.sample import Sample, SampleStatus

REPETITION_WINDOW = 10_000
"""Characters at the end of a response that are looked at for repetition."""
REPETITION_RATIO = 10
"""A tail that zlib shrinks by more than this repeats itself."""
SHORTEST_REPETITION = 100
"""zlib never shrinks fewer bytes than this by REPETITION_RATIO; they need not be tried."""
ZERO_STD = 1e-8
"""Rewards of a group closer together than this carry no gradient under group normalisation."""


def rollout_metrics(groups: Sequence[Sequence[Sample]], reward_key: str | None = None) -> dict[str, float]:
    """Metrics of complete groups. A metric whose inputs were not recorded is absent."""
    samples = [sample for group in groups for sample in group]
    if not samples:
        return {}
    metrics = _spread("rollout/response_len", [sample.response_length for sample in samples])
    metrics["rollout/truncated_ratio"] = _share(s.status is SampleStatus.TRUNCATED for s in samples)
    metrics["rollout/repetition_frac"] = _share(has_repetition(s.response) for s in samples)
    metrics |= _reward_metrics(groups, reward_key)
    metrics |= _weight_version_metrics(samples)
    metrics |= _cache_metrics(samples)
    metrics |= _speculation_metrics(samples)
    return metrics


def has_repetition(text: str) -> bool:
    """Whether the end of the text repeats itself so much that it compresses more than REPETITION_RATIO."""
    if 4 * len(text) <= SHORTEST_REPETITION:  # a character is at most four bytes
        return False
    tail = text[-REPETITION_WINDOW:].encode()
    return len(tail) > SHORTEST_REPETITION and len(tail) > REPETITION_RATIO * len(zlib.compress(tail))


def reward_std(rewards: Sequence[float]) -> float:
    """Population standard deviation of a group's rewards."""
    # statistics.pstdev computes in fractions, which takes longer than the rest of a group's bookkeeping.
    mean = statistics.fmean(rewards)
    return math.sqrt(statistics.fmean((reward - mean) ** 2 for reward in rewards))


def _reward_metrics(groups: Sequence[Sequence[Sample]], reward_key: str | None) -> dict[str, float]:
    scored = [[sample.reward_value(reward_key) for sample in group] for group in groups]
    flat = [reward for group in scored for reward in group]
    known = [reward for reward in flat if reward is not None]
    metrics = {"rollout/none_reward_ratio": _share(reward is None for reward in flat)}
    if known:
        metrics["rollout/raw_reward"] = statistics.fmean(known)
    complete = [[r for r in group if r is not None] for group in scored if None not in group]
    if not complete:
        return metrics
    flat_groups = Counter(group[0] for group in complete if reward_std(group) < ZERO_STD)
    metrics["rollout/zero_std/fraction"] = flat_groups.total() / len(complete)
    metrics["rollout/zero_std/all_zero_percentage"] = flat_groups[0.0] / len(complete)
    metrics["rollout/zero_std/all_one_percentage"] = flat_groups[1.0] / len(complete)
    counts: Counter[str] = Counter()
    for reward, count in flat_groups.items():
        counts[f"rollout/zero_std/count_{round(reward, 1):g}"] += count
    return metrics | dict(counts)


def _weight_version_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    recorded = [sample for sample in samples if sample.weight_versions]
    if not recorded:
        return {}
    versions = [version for sample in recorded for version, _ in sample.weight_versions]
    mixed = _share(len({version for version, _ in s.weight_versions}) > 1 for s in recorded)
    return _spread("rollout/weight_version", versions) | {"rollout/weight_version/mixed_version_ratio": mixed}


def _cache_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    recorded = [(s.cached_tokens, s.prompt_length) for s in samples if s.cached_tokens is not None]
    if not recorded:
        return {}
    cached = sum(tokens for tokens, _ in recorded)
    return {
        "rollout/prefix_cache_hit_rate": cached / sum(length for _, length in recorded),
        "rollout/avg_cached_tokens_per_sample": cached / len(recorded),
    }


def _speculation_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Means over samples, as slime takes them; the rates by depth are over all guesses of the rollout."""
    infos = [sample.spec_info for sample in samples if sample.spec_info and sample.spec_info.verify_steps]
    if not infos:
        return {}
    lengths = [1 + info.accepted_tokens / info.verify_steps for info in infos]
    metrics = {"rollout/spec_accept_length": statistics.fmean(lengths)}
    rates = [info.accepted_tokens / info.draft_tokens for info in infos if info.draft_tokens]
    if rates:
        metrics["rollout/spec_accept_rate"] = statistics.fmean(rates)
    tried, accepted = (
        [sum(counts) for counts in zip_longest(*columns, fillvalue=0)]
        for columns in ([info.tried for info in infos], [info.accepted for info in infos])
    )
    for depth, (judged, stood) in enumerate(zip(tried, accepted, strict=True), 1):
        if judged:
            metrics[f"rollout/spec_accept_rate/depth_{depth}"] = stood / judged
    return metrics


def _spread(prefix: str, values: Sequence[int]) -> dict[str, float]:
    return {
        f"{prefix}/mean": statistics.fmean(values),
        f"{prefix}/median": float(statistics.median(values)),
        f"{prefix}/max": float(max(values)),
        f"{prefix}/min": float(min(values)),
    }


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values)
