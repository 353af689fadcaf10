"""`perf/`: time, throughput and memory."""

from __future__ import annotations

from miles.record.metrics.metric import FRACTION, RATE, SECONDS, Band, Metric

PERFORMANCE: tuple[Metric, ...] = (
    Metric("perf/rollout_time", "time to generate and score the batch", SECONDS, None, "response length"),
    Metric("perf/train_time", "time of forward, backward and optimizer", SECONDS, None, "tokens per step"),
    Metric("perf/log_probs_time", "time to recompute log-probs", SECONDS, None, "tokens per step"),
    Metric(
        "perf/ref_log_probs_time", "time of the reference model's log-probs", SECONDS, None, "tokens per step"
    ),
    Metric(
        "perf/teacher_log_probs_time", "time of the teacher's log-probs", SECONDS, None, "tokens per step"
    ),
    Metric(
        "perf/update_weights_time", "time to bring new weights to the engine", SECONDS, None, "model size"
    ),
    Metric("perf/eval_time", "time of a held-out evaluation", SECONDS, None, "eval prompts and samples"),
    Metric("perf/save_time", "time the step waited for a checkpoint", SECONDS, None, "model size, disk"),
    Metric(
        "perf/wait_time_ratio",
        "share of the step in which training was done and the rollout sampled beside it was not",
        FRACTION,
        None,
        "engines, response length; absent where rollout and training take turns",
    ),
    Metric("perf/step_time", "time of the whole step", SECONDS, None, "all of the above"),
    Metric(
        "perf/tokens_per_sec", "trained tokens, prompt included, per second of step time", RATE, None, "all"
    ),
    Metric(
        "perf/rollout_tokens_per_sec", "generated tokens per second of rollout time", RATE, None, "engine"
    ),
    Metric(
        "perf/spec_tokens_per_sec",
        "tokens per second (of the processor on a CPU) of speculative decode steps, where measured",
        RATE,
        None,
        "acceptance, cost of the draft",
    ),
    Metric(
        "perf/plain_tokens_per_sec",
        "tokens per second (of the processor on a CPU) of plain decode steps on the same batches",
        RATE,
        None,
        "engine",
    ),
    Metric(
        "perf/spec_speedup",
        "perf/spec_tokens_per_sec over perf/plain_tokens_per_sec; below 1 guessing ahead costs time",
        "",
        Band(1.0),
        "acceptance, batch size, speculative_num_steps",
    ),
    Metric("perf/train_tokens_per_sec", "trained tokens per second of train time", RATE, None, "trainer"),
    Metric("perf/cpu_memory_gb", "resident memory of the process", "GB", None, "batch size, leaks"),
)
