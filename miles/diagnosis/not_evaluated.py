"""Symptoms that the field knows and that no rule looks for, each with what the run record lacks.

Rows that preflight answers before a run starts say so: what cannot happen needs no symptom.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Missing:
    """One symptom of the rule base that is not evaluated."""

    id: str
    symptom: str
    lacks: str


NOT_EVALUATED = (
    Missing("RT5", "replayed routes are not consumed in order", "a counter; the trainer asserts it instead"),
    Missing("FP1", "FP8 scale mode does not fit the hardware", "the hardware of the run in meta.json"),
    Missing(
        "FP2",
        "a zero block gives a scale of 0 or NaN",
        "nothing to record: a block of zeros has the scale of the smallest peak",
    ),
    Missing("FP3", "the shape of FP8 scales is wrong", "nothing to record: the reader refuses such a tensor"),
    Missing("FP6", "router or embeddings are quantised", "the list of quantised tensors of each side"),
    Missing("FP7", "exceptions differ between converter, trainer and engine", "the same list"),
    Missing("I41", "INT4 training or rollout on one side only", "nothing to record: preflight refuses it"),
    Missing("I42", "INT4 group size differs", "the checkpoint's group size beside the trainer's"),
    Missing("I44", "shards are missing", "nothing to record: the reader refuses the checkpoint by name"),
    Missing("NV1", "expert-tensor parallelism differs under NVFP4", "the engine's layout"),
    Missing("LS1", "the FP16 loss scale falls", "the loss scale; no trainer scales the loss"),
    Missing("RO6", "requests are aborted", "the share of aborted requests of each step"),
    Missing(
        "RO11", "the engine is busy and completes nothing", "completions over time; SY1 sees the open phase"
    ),
    Missing("SY6", "the KV cache bounds concurrency", "KV usage and running requests of each engine"),
    Missing("SY7", "KV usage is high", "KV usage of each engine"),
    Missing("SY9", "ranks of an engine are loaded unevenly", "running requests of each rank"),
    Missing("SY18", "weights differ after an update", "the result of comparing weights after an update"),
)

FOREIGN_METRICS = {
    "MM13": "train/mis_catastrophic_seq_fraction",
    "RO9": "rollout/tito_session_mismatch_rate/special_token",
    "SY5": "perf/actor_train_mfu",
    "SY19": "perf/update_weights_density",
}
"""Rules whose metric our own runs do not record yet: they are evaluated on the files of other systems."""
