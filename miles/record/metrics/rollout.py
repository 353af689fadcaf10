"""`rollout/`: what was sampled, and what it was worth."""

from __future__ import annotations

from miles.record.metrics.metric import FRACTION, NATS, TOKENS, Band, Metric

ROLLOUT: tuple[Metric, ...] = (
    Metric("rollout/raw_reward", "mean reward as the verifier gave it", "", None, "the policy; the goal"),
    Metric(
        "rollout/rewards", "mean reward after shaping and normalisation", "", None, "reward normalisation"
    ),
    Metric(
        "rollout/overlong_penalty",
        "mean of what the soft overlong punishment adds to a reward",
        "",
        Band(-0.2, 0),
        "response length, reward.overlong_buffer_len",
    ),
    Metric(
        "rollout/overlong_frac",
        "fraction of samples that reach into the overlong buffer",
        FRACTION,
        Band(0, 0.2),
        "response length, reward.overlong_buffer_len",
    ),
    Metric("rollout/response_len/mean", "mean response length", TOKENS, None, "policy, truncation"),
    Metric("rollout/response_len/median", "median response length", TOKENS, None, "policy"),
    Metric("rollout/response_len/max", "longest response", TOKENS, None, "rollout_max_response_len"),
    Metric("rollout/response_len/min", "shortest response", TOKENS, None, "policy"),
    Metric(
        "rollout/truncated_ratio",
        "fraction of responses cut at the length cap",
        FRACTION,
        Band(0, 0.25),
        "rollout_max_response_len, stop tokens, a policy that forgot to stop",
    ),
    Metric(
        "rollout/repetition_frac",
        "fraction of responses that repeat themselves (tail compresses more than 10x)",
        FRACTION,
        Band(0, 0.01),
        "degenerate loops, temperature",
    ),
    Metric(
        "rollout/zero_std/all_zero_percentage",
        "fraction of prompt groups in which every reward is 0",
        FRACTION,
        None,
        "task too hard, or a broken reward",
    ),
    Metric(
        "rollout/zero_std/all_one_percentage",
        "fraction of prompt groups in which every reward is 1",
        FRACTION,
        None,
        "task being solved",
    ),
    Metric(
        "rollout/zero_std/fraction",
        "fraction of prompt groups whose rewards are all equal",
        FRACTION,
        None,
        "the two above; bad only while the reward does not rise",
    ),
    Metric(
        "rollout/zero_std/count_<reward>",
        "number of prompt groups in which every reward rounds to this value",
        "groups",
        None,
        "as rollout/zero_std/fraction",
    ),
    Metric(
        "rollout/dynamic_filter/drop_<reason>",
        "prompt groups that the dynamic sampling filter left out, by reason",
        "groups",
        None,
        "task difficulty, dynamic_sampling_filter_path",
    ),
    Metric(
        "rollout/prefix_cache_hit_rate",
        "fraction of prompt tokens that the engine did not have to compute again",
        FRACTION,
        None,
        "group size, shared prefixes",
    ),
    Metric(
        "rollout/avg_cached_tokens_per_sample",
        "prompt tokens per sample served from the engine's cache",
        TOKENS,
        None,
        "group size, shared prefixes",
    ),
    Metric(
        "rollout/spec_accept_rate",
        "accepted per drafted token of speculative decoding, mean over samples",
        FRACTION,
        None,
        "how well the draft follows the policy; speculative_num_steps, MTP training",
    ),
    Metric(
        "rollout/spec_accept_length",
        "tokens per verification of speculative decoding, mean over samples; 1 is plain decoding",
        TOKENS,
        Band(1.3),
        "as rollout/spec_accept_rate",
    ),
    Metric(
        "rollout/spec_accept_rate/depth_<i>",
        "accepted per judged guess at this depth: those before it were accepted",
        FRACTION,
        None,
        "as rollout/spec_accept_rate; a draft gets worse with depth",
    ),
    Metric("rollout/log_probs", "mean trainer log-prob of the sampled tokens", NATS, None, "policy entropy"),
    Metric(
        "rollout/rollout_log_probs",
        "mean engine log-prob of the sampled tokens",
        NATS,
        None,
        "policy entropy",
    ),
    Metric("rollout/ref_log_probs", "mean reference log-prob of the sampled tokens", NATS, None, "drift"),
    Metric(
        "rollout/opd_reverse_kl",
        "mean student minus teacher log-prob of the sampled tokens: KL(student || teacher)",
        NATS,
        None,
        "on-policy distillation; falls as the student learns",
    ),
    Metric(
        "rollout/teacher_log_probs", "mean teacher log-prob of the sampled tokens", NATS, None, "the student"
    ),
    Metric(
        "rollout/none_reward_ratio",
        "fraction of samples for which no reward could be computed",
        FRACTION,
        Band(0, 0),
        "verifier or environment errors",
    ),
    Metric(
        "rollout/bad_rows",
        "prompt rows left out so far because they could not be read",
        "rows",
        Band(0, 0),
        "the prompt file",
    ),
    Metric("rollout/weight_version/min", "oldest weight version in the batch", "version", None, "staleness"),
    Metric("rollout/weight_version/mean", "mean weight version in the batch", "version", None, "staleness"),
    Metric(
        "rollout/weight_version/median", "median weight version in the batch", "version", None, "staleness"
    ),
    Metric(
        "rollout/weight_version/max", "newest weight version in the batch", "version", None, "weight sync"
    ),
    Metric(
        "rollout/weight_version/eval",
        "weight version that answered the held-out sets",
        "version",
        None,
        "update_weights_interval",
    ),
    Metric(
        "rollout/weight_version/mixed_version_ratio",
        "fraction of samples generated by more than one weight version",
        FRACTION,
        Band(0, 0.5),
        "partial rollout, in-flight updates",
    ),
    Metric(
        "rollout/kept_groups",
        "unfinished or surplus prompt groups that the next rollout goes on with",
        "",
        None,
        "over_sampling_batch_size, partial_rollout",
    ),
    Metric(
        "rollout/entropy", "mean entropy at the sampled positions, before the update", NATS, None, "policy"
    ),
)
