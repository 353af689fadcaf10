"""`eval/`: held-out prompts."""

from __future__ import annotations

from miles.record.metrics.metric import FRACTION, Band, Metric

EVALUATION: tuple[Metric, ...] = (
    Metric("eval/<name>", "held-out accuracy, sampled at eval_temperature", "", None, "the policy"),
    Metric("eval/<name>-greedy", "held-out accuracy of greedy decoding", "", None, "the policy's mode"),
    Metric(
        "eval/<name>-truncated_ratio",
        "fraction of held-out responses cut at the length cap",
        FRACTION,
        Band(0, 0.25),
        "eval_max_response_len",
    ),
)
