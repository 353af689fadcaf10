"""`train/`: how far trainer and engine are apart, and what corrections make of it."""

from __future__ import annotations

from miles.record.metrics.metric import FRACTION, NATS, TOKENS, Band, Metric

_MISMATCH = "differences between trainer and engine, stale data"

MISMATCH: tuple[Metric, ...] = (
    Metric(
        "train/train_rollout_logprob_abs_diff",
        "mean |trainer log-prob - engine log-prob| of the sampled tokens, same weights",
        NATS,
        Band(0, 0.03),
        "kernels, precision, stale weights, routing flips, different sampling parameters",
    ),
    Metric(
        "train/train_rollout_logprob_abs_diff_max",
        "largest |trainer log-prob - engine log-prob| of the step",
        NATS,
        None,
        "single tokens that took another expert, or a token mismatch",
    ),
    Metric(
        "train/train_rollout_logprob_abs_diff_p99",
        "99th percentile of |trainer log-prob - engine log-prob|",
        NATS,
        Band(0, 0.3),
        "as the mean; rises first",
    ),
    Metric(
        "train/train_rollout_kl",
        "k3 estimate of KL(rollout || trainer) over the sampled tokens",
        NATS,
        Band(0, 0.01),
        "as train_rollout_logprob_abs_diff",
    ),
    Metric(
        "train/ratio_gt2_frac",
        "fraction of tokens whose trainer/engine probability ratio is above 2 or below 1/2",
        FRACTION,
        Band(0, 0.01),
        "routing flips, stale weights",
    ),
    *(
        Metric(
            f"train/{name}_no_replay",
            f"{name} as it would be without routing replay, on a bounded part of the batch",
            unit,
            None,
            "routing flips: the difference from the same metric with replay is what replay removes",
        )
        for name, unit in (
            ("train_rollout_logprob_abs_diff", NATS),
            ("train_rollout_logprob_abs_diff_max", NATS),
            ("train_rollout_logprob_abs_diff_p99", NATS),
            ("train_rollout_kl", NATS),
            ("ratio_gt2_frac", FRACTION),
        )
    ),
    *(
        Metric(
            f"train/train_rollout_logprob_abs_diff_flipped{suffix}",
            f"the mean gap of tokens whose experts the trainer would choose otherwise{how}",
            NATS,
            None,
            "routing flips: what replay removes, it removes here",
        )
        for suffix, how in (("", ""), ("_no_replay", ", without replay, on a bounded part of the batch"))
    ),
    Metric(
        "train/tis",
        "mean truncated importance weight",
        "",
        Band(0.9, 1.1),
        "systematic shift between trainer and engine",
    ),
    Metric(
        "train/tis_clipfrac",
        "fraction of tokens whose importance weight was truncated or masked",
        FRACTION,
        Band(0, 0.01),
        "off-policy data, precision mismatch",
    ),
    Metric(
        "train/tis_abs",
        "mean |importance weight - 1|",
        "",
        Band(0, 0.1),
        "as train/tis, but both directions add up",
    ),
    Metric(
        "train/tis_bounded",
        "tokens whose log importance weight had to be bounded at +-20 before exponentiation",
        TOKENS,
        Band(0, 0),
        "correction.tis_level = sequence over long responses",
    ),
    Metric(
        "train/tis_scale",
        "mean importance weight of the step that weights were divided by",
        "",
        Band(0.5, 2),
        "correction.tis_batch_normalize; as train/tis",
    ),
    Metric(
        "train/rs_frac",
        "fraction of tokens that rejection leaves out of the loss",
        FRACTION,
        Band(0, 0.1),
        "off-policy data, the bounds of correction.rs_*",
    ),
    Metric(
        "train/rs_veto_frac",
        "fraction of tokens in sequences that one far too unlikely token rejects",
        FRACTION,
        Band(0, 0.1),
        "correction.rs_veto_threshold; broken log-probs",
    ),
    Metric("train/mis_kl", "mean k1 estimate of KL(rollout || train)", NATS, None, _MISMATCH),
    Metric("train/mis_k3_kl", "mean k3 estimate of KL(rollout || train)", NATS, None, _MISMATCH),
    Metric(
        "train/mis_training_log_ppl", "log perplexity of responses under the trainer", NATS, None, "policy"
    ),
    Metric("train/mis_rollout_log_ppl", "log perplexity of responses under the engine", NATS, None, "policy"),
    Metric("train/mis_training_ppl", "perplexity of responses under the trainer", "", None, "policy entropy"),
    Metric("train/mis_rollout_ppl", "perplexity of responses under the engine", "", None, "policy entropy"),
    Metric("train/mis_log_ppl_diff", "log perplexity of trainer minus engine", NATS, None, _MISMATCH),
    Metric(
        "train/mis_log_ppl_abs_diff", "size of that difference, mean over responses", NATS, None, _MISMATCH
    ),
    Metric("train/mis_ppl_ratio", "perplexity of trainer over engine", "", None, _MISMATCH),
    Metric(
        "train/opsm_clipfrac",
        "fraction of tokens left out by the off-policy sequence mask",
        FRACTION,
        None,
        "stale data, algorithm.opsm_delta",
    ),
    Metric(
        "train/ois",
        "mean importance weight of the policy update, current over rollout",
        "",
        Band(0.9, 1.1),
        "as train/tis",
    ),
)
