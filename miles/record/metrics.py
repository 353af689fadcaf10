"""Every metric, declared once: what it means, its unit, its healthy range, and what moves it.

The writer refuses a name that is not here, `docs/reference/metrics.md` is generated from here, and the
terminal and the rules read the ranges. A metric that cannot be computed is absent, never zero.
`<i>` in a name stands for a number, any other `<word>` for a text without a slash.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

FRACTION = "fraction"
NATS = "nats"
TOKENS = "tokens"
SECONDS = "s"
RATE = "tokens/s"
MISMATCH = "differences between trainer and engine, stale data"


@dataclass(frozen=True)
class Band:
    """A healthy range; an open side is None. Bounds belong to the range."""

    low: float | None = None
    high: float | None = None

    def contains(self, value: float) -> bool:
        """Whether `value` is healthy; a NaN never is."""
        above = value >= self.low if self.low is not None else value == value
        below = value <= self.high if self.high is not None else value == value
        return above and below

    def __str__(self) -> str:
        if self.low is None:
            return f"≤ {self.high:g}"
        if self.high is None:
            return f"≥ {self.low:g}"
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g} – {self.high:g}"


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    name: str
    meaning: str
    unit: str
    healthy: Band | None
    moved_by: str

    @property
    def group(self) -> str:
        return self.name.split("/", 1)[0]


def _m(name: str, meaning: str, unit: str, healthy: Band | None, moved_by: str) -> Metric:
    return Metric(name, meaning, unit, healthy, moved_by)


METRICS: tuple[Metric, ...] = (
    # -- the loss and the policy --
    _m("train/loss", "the loss that was minimised", "", None, "every term of the algorithm"),
    _m("train/pg_loss", "policy-gradient term of the loss", "", None, "advantages, ratio clipping"),
    _m(
        "train/entropy",
        "mean entropy of the policy over response tokens (slime: entropy_loss)",
        NATS,
        Band(0.02, 1.5),
        "falls as the policy gets sure; learning rate, clip-higher and the entropy bonus move it",
    ),
    _m(
        "train/pg_clipfrac",
        "fraction of tokens whose ratio was clipped",
        FRACTION,
        Band(0, 0.2),
        "learning rate and optimizer steps per rollout",
    ),
    _m(
        "train/ppo_kl",
        "mean of old minus current log-prob: how far the policy moved inside this rollout",
        NATS,
        Band(-0.05, 0.05),
        "learning rate and steps per rollout; 0 in the first step of a rollout",
    ),
    _m(
        "train/ess_ratio",
        "effective sample size (sum w)^2 / (n sum w^2) of the importance ratios",
        FRACTION,
        Band(0.8, 1),
        "stale data, too many steps per rollout",
    ),
    _m("train/kl_loss", "KL term against the reference model", NATS, None, "drift from the reference model"),
    _m(
        "train/train_rollout_logprob_abs_diff",
        "mean |trainer log-prob - engine log-prob| of the sampled tokens, same weights",
        NATS,
        Band(0, 0.03),
        "kernels, precision, stale weights, routing flips, different sampling parameters",
    ),
    _m(
        "train/train_rollout_logprob_abs_diff_max",
        "largest |trainer log-prob - engine log-prob| of the step",
        NATS,
        None,
        "single tokens that took another expert, or a token mismatch",
    ),
    _m(
        "train/train_rollout_logprob_abs_diff_p99",
        "99th percentile of |trainer log-prob - engine log-prob|",
        NATS,
        Band(0, 0.3),
        "as the mean; rises first",
    ),
    _m(
        "train/train_rollout_kl",
        "k3 estimate of KL(rollout || trainer) over the sampled tokens",
        NATS,
        Band(0, 0.01),
        "as train_rollout_logprob_abs_diff",
    ),
    _m(
        "train/ratio_gt2_frac",
        "fraction of tokens whose trainer/engine probability ratio is above 2 or below 1/2",
        FRACTION,
        Band(0, 0.01),
        "routing flips, stale weights",
    ),
    *(
        _m(
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
        _m(
            f"train/train_rollout_logprob_abs_diff_flipped{suffix}",
            f"the mean gap of tokens whose experts the trainer would choose otherwise{how}",
            NATS,
            None,
            "routing flips: what replay removes, it removes here",
        )
        for suffix, how in (("", ""), ("_no_replay", ", without replay, on a bounded part of the batch"))
    ),
    _m(
        "train/tis",
        "mean truncated importance weight",
        "",
        Band(0.9, 1.1),
        "systematic shift between trainer and engine",
    ),
    _m(
        "train/tis_clipfrac",
        "fraction of tokens whose importance weight was truncated or masked",
        FRACTION,
        Band(0, 0.01),
        "off-policy data, precision mismatch",
    ),
    _m(
        "train/tis_abs",
        "mean |importance weight - 1|",
        "",
        Band(0, 0.1),
        "as train/tis, but both directions add up",
    ),
    _m(
        "train/tis_bounded",
        "tokens whose log importance weight had to be bounded at +-20 before exponentiation",
        TOKENS,
        Band(0, 0),
        "correction.tis_level = sequence over long responses",
    ),
    _m(
        "train/tis_scale",
        "mean importance weight of the step that weights were divided by",
        "",
        Band(0.5, 2),
        "correction.tis_batch_normalize; as train/tis",
    ),
    _m(
        "train/rs_frac",
        "fraction of tokens that rejection leaves out of the loss",
        FRACTION,
        Band(0, 0.1),
        "off-policy data, the bounds of correction.rs_*",
    ),
    _m(
        "train/rs_veto_frac",
        "fraction of tokens in sequences that one far too unlikely token rejects",
        FRACTION,
        Band(0, 0.1),
        "correction.rs_veto_threshold; broken log-probs",
    ),
    _m("train/mis_kl", "mean k1 estimate of KL(rollout || train)", NATS, None, MISMATCH),
    _m("train/mis_k3_kl", "mean k3 estimate of KL(rollout || train)", NATS, None, MISMATCH),
    _m("train/mis_training_log_ppl", "log perplexity of responses under the trainer", NATS, None, "policy"),
    _m("train/mis_rollout_log_ppl", "log perplexity of responses under the engine", NATS, None, "policy"),
    _m("train/mis_training_ppl", "perplexity of responses under the trainer", "", None, "policy entropy"),
    _m("train/mis_rollout_ppl", "perplexity of responses under the engine", "", None, "policy entropy"),
    _m("train/mis_log_ppl_diff", "log perplexity of trainer minus engine", NATS, None, MISMATCH),
    _m("train/mis_log_ppl_abs_diff", "size of that difference, mean over responses", NATS, None, MISMATCH),
    _m("train/mis_ppl_ratio", "perplexity of trainer over engine", "", None, MISMATCH),
    _m("train/custom/<name>", "what a function of yours reports", "", None, "that function"),
    _m(
        "train/opsm_clipfrac",
        "fraction of tokens left out by the off-policy sequence mask",
        FRACTION,
        None,
        "stale data, algorithm.opsm_delta",
    ),
    _m(
        "train/log_ratio_bounded",
        "tokens whose log ratio had to be bounded before exponentiation",
        TOKENS,
        Band(0, 0),
        "a policy that left the data far behind; overflow",
    ),
    _m(
        "train/ois",
        "mean importance weight of the policy update, current over rollout",
        "",
        Band(0.9, 1.1),
        "as train/tis",
    ),
    _m(
        "train/grad_norm",
        "gradient norm before clipping",
        "",
        None,
        "learning rate, outlier samples; judged against its own past",
    ),
    _m("train/lr", "learning rate of the step", "", None, "schedule, or a live change"),
    _m(
        "train/aux_loss",
        "load-balancing loss of the routers (1 = perfectly balanced)",
        "",
        None,
        "router drift, moe_aux_loss_coeff",
    ),
    _m(
        "train/mtp_loss",
        "cross-entropy of the MTP layers to the sampled tokens, mean over depths",
        NATS,
        Band(high=1.0),
        "how well the draft follows the policy; the policy's own entropy is its floor",
    ),
    _m(
        "train/mtp_accuracy/depth_<i>",
        "share of tokens that are the draft's first choice, i tokens ahead",
        FRACTION,
        None,
        "speculative.enable_mtp_training, the learning rate",
    ),
    _m(
        "train/mtp_grad_norm",
        "norm of the MTP layers' gradient before clipping, which is their own",
        "",
        None,
        "speculative.mtp_loss_scaling_factor",
    ),
    _m(
        "train/mtp_non_finite_elements",
        "elements that kept the MTP layers from being updated; absent when there were none",
        "",
        Band(high=0.0),
        "non-finite values and training.non_finite_policy",
    ),
    _m(
        "train/non_finite_elements",
        "NaN or infinite elements met in loss and gradients",
        "elements",
        Band(0, 0),
        "overflow, bad data",
    ),
    _m(
        "train/step_skipped",
        "1 when the optimizer step was skipped because of a non-finite value",
        "0 or 1",
        Band(0, 0),
        "non-finite values and training.non_finite_policy",
    ),
    _m(
        "train/active_group_fraction",
        "fraction of prompt groups with a non-zero advantage",
        FRACTION,
        None,
        "task difficulty against the policy; falls as a task is solved, and as a policy dies",
    ),
    # -- routing --
    _m(
        "route/flip_frac",
        "fraction of (token, MoE layer) choices the trainer would make differently from the engine",
        FRACTION,
        Band(0, 0.1),
        "kernel and precision noise; without replay it becomes a log-prob gap",
    ),
    _m(
        "route/flip_frac/layer_<i>",
        "the same for one MoE layer, counted from 0",
        FRACTION,
        Band(0, 0.15),
        "as route/flip_frac; one bad layer points at that layer's weights or offset",
    ),
    _m(
        "route/token_any_flip_frac",
        "fraction of tokens with a different choice in at least one layer",
        FRACTION,
        None,
        "as route/flip_frac; grows with depth",
    ),
    _m(
        "route/zero_overlap_frac",
        "fraction of (token, layer) choices that share no expert with the engine's",
        FRACTION,
        Band(0, 0.01),
        "wrong layer order, shifted rows, stale weights",
    ),
    _m(
        "route/dispatched_flip_frac",
        "fraction of (token, MoE layer) pairs that the trainer sent to other experts than the engine did",
        FRACTION,
        None,
        "exactly 0 where every row is replayed; route/flip_frac without replay",
    ),
    _m(
        "route/ref_dispatched_flip_frac",
        "the same for the reference model, which decides for itself: the routes are not its own",
        FRACTION,
        None,
        "distance of the policy from the reference; it adds to the measured KL",
    ),
    *(
        _m(
            f"route/{name}_no_replay{layer}",
            f"{name} without routing replay, on a bounded part of the batch{told}",
            FRACTION,
            None,
            "kernel and precision noise, which grows from layer to layer where nothing is replayed",
        )
        for name, layer, told in (
            ("flip_frac", "", ""),
            ("flip_frac", "/layer_<i>", ", for one MoE layer"),
            ("token_any_flip_frac", "", ""),
            ("zero_overlap_frac", "", ""),
            ("dispatched_flip_frac", "", ""),
        )
    ),
    _m(
        "route/replayed_rows_frac",
        "fraction of rows whose routes were replayed from the engine",
        FRACTION,
        Band(0.99, 1),
        "engine returning routes, alignment.use_rollout_routing_replay",
    ),
    _m(
        "route/expert_load_max_over_mean",
        "load of the busiest expert over the mean load, worst layer",
        "",
        Band(1, 5),
        "router collapse, load balancing",
    ),
    _m(
        "route/expert_load_max_over_mean/layer_<i>",
        "the same for one MoE layer, counted from 0",
        "",
        Band(1, 5),
        "as route/expert_load_max_over_mean; one bad layer points at that layer's router",
    ),
    _m("route/bytes_per_token", "memory of the recorded routes per token", "bytes", None, "layers x top-k"),
    _m(
        "route/wire_bytes_per_token",
        "the same on disk and between processes: one byte per expert id where the experts fit",
        "bytes",
        None,
        "layers x top-k, number of experts, rows that were not recorded",
    ),
    # -- number formats --
    *(
        _m(f"precision/{kind}_{name}{layer}", f"{meaning}{told}", FRACTION, healthy, moved_by)
        for kind, numbers in (("weight", "weights"), ("activation", "activations"))
        for name, meaning, healthy, moved_by in (
            (
                "error",
                f"size of what rounding changed in the trainer's {numbers}, relative to the {numbers}: "
                "|rounded - exact| / |exact|",
                Band(0, 0.2),
                "number format, group size, outliers; about 0.03 for FP8, 0.1 for INT4",
            ),
            (
                "saturated_frac",
                f"fraction of {numbers} cut off at the largest number of the format",
                Band(0, 0.01),
                "outliers under scales that do not follow the peaks; 0 where they do",
            ),
            (
                "underflow_frac",
                f"fraction of non-zero {numbers} that became 0",
                None,
                "outliers that widen a scale; near 0 for FP8, about 0.1 for INT4",
            ),
        )
        for layer, told in (("", ""), ("/layer_<i>", ", for one layer, counted from 0"))
    ),
    # -- rollout --
    _m("rollout/raw_reward", "mean reward as the verifier gave it", "", None, "the policy; the goal"),
    _m("rollout/rewards", "mean reward after shaping and normalisation", "", None, "reward normalisation"),
    _m(
        "rollout/overlong_penalty",
        "mean of what the soft overlong punishment adds to a reward",
        "",
        Band(-0.2, 0),
        "response length, reward.overlong_buffer_len",
    ),
    _m(
        "rollout/overlong_frac",
        "fraction of samples that reach into the overlong buffer",
        FRACTION,
        Band(0, 0.2),
        "response length, reward.overlong_buffer_len",
    ),
    _m("rollout/response_len/mean", "mean response length", TOKENS, None, "policy, truncation"),
    _m("rollout/response_len/median", "median response length", TOKENS, None, "policy"),
    _m("rollout/response_len/max", "longest response", TOKENS, None, "rollout_max_response_len"),
    _m("rollout/response_len/min", "shortest response", TOKENS, None, "policy"),
    _m(
        "rollout/truncated_ratio",
        "fraction of responses cut at the length cap",
        FRACTION,
        Band(0, 0.25),
        "rollout_max_response_len, stop tokens, a policy that forgot to stop",
    ),
    _m(
        "rollout/repetition_frac",
        "fraction of responses that repeat themselves (tail compresses more than 10x)",
        FRACTION,
        Band(0, 0.01),
        "degenerate loops, temperature",
    ),
    _m(
        "rollout/zero_std/all_zero_percentage",
        "fraction of prompt groups in which every reward is 0",
        FRACTION,
        None,
        "task too hard, or a broken reward",
    ),
    _m(
        "rollout/zero_std/all_one_percentage",
        "fraction of prompt groups in which every reward is 1",
        FRACTION,
        None,
        "task being solved",
    ),
    _m(
        "rollout/zero_std/fraction",
        "fraction of prompt groups whose rewards are all equal",
        FRACTION,
        None,
        "the two above; bad only while the reward does not rise",
    ),
    _m(
        "rollout/zero_std/count_<reward>",
        "number of prompt groups in which every reward rounds to this value",
        "groups",
        None,
        "as rollout/zero_std/fraction",
    ),
    _m(
        "rollout/dynamic_filter/drop_<reason>",
        "prompt groups that the dynamic sampling filter left out, by reason",
        "groups",
        None,
        "task difficulty, dynamic_sampling_filter_path",
    ),
    _m(
        "rollout/prefix_cache_hit_rate",
        "fraction of prompt tokens that the engine did not have to compute again",
        FRACTION,
        None,
        "group size, shared prefixes",
    ),
    _m(
        "rollout/avg_cached_tokens_per_sample",
        "prompt tokens per sample served from the engine's cache",
        TOKENS,
        None,
        "group size, shared prefixes",
    ),
    _m(
        "rollout/spec_accept_rate",
        "accepted per drafted token of speculative decoding, mean over samples",
        FRACTION,
        None,
        "how well the draft follows the policy; speculative_num_steps, MTP training",
    ),
    _m(
        "rollout/spec_accept_length",
        "tokens per verification of speculative decoding, mean over samples; 1 is plain decoding",
        TOKENS,
        Band(1.3),
        "as rollout/spec_accept_rate",
    ),
    _m(
        "rollout/spec_accept_rate/depth_<i>",
        "accepted per judged guess at this depth: those before it were accepted",
        FRACTION,
        None,
        "as rollout/spec_accept_rate; a draft gets worse with depth",
    ),
    _m("rollout/log_probs", "mean trainer log-prob of the sampled tokens", NATS, None, "policy entropy"),
    _m(
        "rollout/rollout_log_probs",
        "mean engine log-prob of the sampled tokens",
        NATS,
        None,
        "policy entropy",
    ),
    _m("rollout/ref_log_probs", "mean reference log-prob of the sampled tokens", NATS, None, "drift"),
    _m(
        "rollout/opd_reverse_kl",
        "mean student minus teacher log-prob of the sampled tokens: KL(student || teacher)",
        NATS,
        None,
        "on-policy distillation; falls as the student learns",
    ),
    _m("rollout/teacher_log_probs", "mean teacher log-prob of the sampled tokens", NATS, None, "the student"),
    _m(
        "rollout/none_reward_ratio",
        "fraction of samples for which no reward could be computed",
        FRACTION,
        Band(0, 0),
        "verifier or environment errors",
    ),
    _m(
        "rollout/bad_rows",
        "prompt rows left out so far because they could not be read",
        "rows",
        Band(0, 0),
        "the prompt file",
    ),
    _m("rollout/weight_version/min", "oldest weight version in the batch", "version", None, "staleness"),
    _m("rollout/weight_version/mean", "mean weight version in the batch", "version", None, "staleness"),
    _m("rollout/weight_version/median", "median weight version in the batch", "version", None, "staleness"),
    _m("rollout/weight_version/max", "newest weight version in the batch", "version", None, "weight sync"),
    _m(
        "rollout/weight_version/mixed_version_ratio",
        "fraction of samples generated by more than one weight version",
        FRACTION,
        Band(0, 0.5),
        "partial rollout, in-flight updates",
    ),
    _m(
        "rollout/kept_groups",
        "unfinished or surplus prompt groups that the next rollout goes on with",
        "",
        None,
        "over_sampling_batch_size, partial_rollout",
    ),
    _m("rollout/entropy", "mean entropy at the sampled positions, before the update", NATS, None, "policy"),
    # -- time and memory --
    _m("perf/rollout_time", "time to generate and score the batch", SECONDS, None, "response length"),
    _m("perf/train_time", "time of forward, backward and optimizer", SECONDS, None, "tokens per step"),
    _m("perf/log_probs_time", "time to recompute log-probs", SECONDS, None, "tokens per step"),
    _m(
        "perf/ref_log_probs_time", "time of the reference model's log-probs", SECONDS, None, "tokens per step"
    ),
    _m("perf/teacher_log_probs_time", "time of the teacher's log-probs", SECONDS, None, "tokens per step"),
    _m("perf/update_weights_time", "time to bring new weights to the engine", SECONDS, None, "model size"),
    _m("perf/eval_time", "time of a held-out evaluation", SECONDS, None, "eval prompts and samples"),
    _m("perf/save_time", "time the step waited for a checkpoint", SECONDS, None, "model size, disk"),
    _m(
        "perf/wait_time_ratio",
        "share of the step in which training was done and the rollout sampled beside it was not",
        FRACTION,
        None,
        "engines, response length; absent where rollout and training take turns",
    ),
    _m("perf/step_time", "time of the whole step", SECONDS, None, "all of the above"),
    _m("perf/tokens_per_sec", "trained tokens, prompt included, per second of step time", RATE, None, "all"),
    _m("perf/rollout_tokens_per_sec", "generated tokens per second of rollout time", RATE, None, "engine"),
    _m(
        "perf/spec_tokens_per_sec",
        "tokens per second (of the processor on a CPU) of speculative decode steps, where measured",
        RATE,
        None,
        "acceptance, cost of the draft",
    ),
    _m(
        "perf/plain_tokens_per_sec",
        "tokens per second (of the processor on a CPU) of plain decode steps on the same batches",
        RATE,
        None,
        "engine",
    ),
    _m(
        "perf/spec_speedup",
        "perf/spec_tokens_per_sec over perf/plain_tokens_per_sec; below 1 guessing ahead costs time",
        "",
        Band(1.0),
        "acceptance, batch size, speculative_num_steps",
    ),
    _m("perf/train_tokens_per_sec", "trained tokens per second of train time", RATE, None, "trainer"),
    _m("perf/cpu_memory_gb", "resident memory of the process", "GB", None, "batch size, leaks"),
    # -- evaluation --
    _m("eval/<name>", "held-out accuracy, sampled at eval_temperature", "", None, "the policy"),
    _m("eval/<name>-greedy", "held-out accuracy of greedy decoding", "", None, "the policy's mode"),
    _m(
        "eval/<name>-truncated_ratio",
        "fraction of held-out responses cut at the length cap",
        FRACTION,
        Band(0, 0.25),
        "eval_max_response_len",
    ),
)

_EXACT = {m.name: m for m in METRICS if "<" not in m.name}


def _pattern(name: str) -> re.Pattern[str]:
    escaped = re.escape(name).replace("<i>", r"\d+")
    return re.compile(re.sub(r"<\w+>", "[^/]+", escaped) + r"\Z")


# Longest first: "eval/<name>-greedy" must win over "eval/<name>".
_PATTERNS = sorted(
    ((_pattern(m.name), m) for m in METRICS if "<" in m.name), key=lambda pair: -len(pair[1].name)
)


@functools.lru_cache(maxsize=4096)
def find_metric(name: str) -> Metric | None:
    """The declaration of `name`, None when there is none."""
    if name in _EXACT:
        return _EXACT[name]
    return next((metric for pattern, metric in _PATTERNS if pattern.match(name)), None)
