"""The kinds of record that have a fixed meaning, and the fields each must carry.

Every line has `kind`, `writer`, `attempt`, `seq` and `time` (seconds since the epoch); `step` is the number
of finished optimizer steps when the line was written, counted from 1: step 0 is what was measured before
training. Other kinds may be written freely; these are the ones that readers and rules rely on.
"""

from __future__ import annotations

METRICS = "metrics"
PHASE_START = "phase_start"
PHASE_END = "phase_end"
ALERT = "alert"
RESUME = "resume"
RUN_START = "run_start"
RUN_END = "run_end"
EXCEPTION = "exception"
WORKER_START = "worker_start"
WORKER_DEAD = "worker_dead"
RESTART = "restart"
RESTART_FAILED = "restart_failed"
NODE_LOST = "node_lost"
RESUMED_BETWEEN_UPDATES = "resumed_between_updates"
NON_FINITE = "non_finite"
ROUTES_MISSING = "routes_missing"
BAD_ROW = "bad_row"
NUMERICS = "numerics"
CHECKPOINT = "checkpoint"
CONTROL = "control"
RECORD_GAP = "record_gap"
RECORD_REPAIRED = "record_repaired"

RESERVED = frozenset({"kind", "writer", "attempt", "seq", "time", "nonfinite"})

REQUIRED_FIELDS: dict[str, tuple[str, ...]] = {
    METRICS: ("step", "metrics"),
    PHASE_START: ("phase",),
    PHASE_END: ("phase", "start_seq", "seconds"),
    ALERT: ("rule", "severity", "title", "state"),
    RESUME: ("step",),
    RUN_END: ("status",),
    EXCEPTION: ("type", "message", "traceback", "worker"),
    WORKER_START: ("worker", "pid"),
    WORKER_DEAD: ("worker", "reason"),
    RESTART: ("worker",),
    RESTART_FAILED: ("worker", "reason"),
    NODE_LOST: ("address", "workers"),
    RESUMED_BETWEEN_UPDATES: ("step", "interval"),
    NON_FINITE: ("step", "tensor", "what", "count"),
    ROUTES_MISSING: ("step", "what", "count"),
    BAD_ROW: ("file", "line", "reason"),
    NUMERICS: ("step", "numerics"),
    CHECKPOINT: ("step", "path"),
    CONTROL: ("request", "action", "state"),
    RECORD_GAP: ("lost", "error"),
    RECORD_REPAIRED: ("dropped_bytes",),
}
"""`non_finite`: `what` is loss, gradient, logits, log_probs or weight; `tensor` is its published name.
`routes_missing`: `what` says which samples came without routed experts or with a wrong shape.
`resumed_between_updates`: the engines go on with the weights of `step`, where they had older ones.
`numerics`: what exact numerics were found on the machine, in words, by operation."""
