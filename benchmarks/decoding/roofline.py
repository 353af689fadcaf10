"""The two ceilings of this machine, and the rate at which they would let a batch decode.

A roof (https://doi.org/10.1145/1498765.1498785) per decode step: no step is shorter than its multiply-adds at
the speed of a large matrix product, nor than its bytes at the speed of a copy of as many. Bytes: every matrix
weight once per step (of the experts those that the batch is expected to visit), and every sequence's keys and
values.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch

from decoding.models import Subject, matrix_weights
from decoding.workload import Workload

SIDE = 1024
MOST_COPIED, LEAST_COPIED = 1 << 28, 1 << 16
REPEATS = 7
BYTES = 4
"""Of an fp32 number."""


@cache
def flops() -> float:
    """FLOP/s of processor time of an fp32 product of two square matrices, the best of several."""
    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    out = torch.empty_like(a)
    return 2 * SIDE**3 / _seconds(lambda: torch.mm(a, b, out=out))


@cache
def bandwidth(num_bytes: int) -> float:
    """Bytes/s, read plus written, of a copy of `num_bytes`: what fits a cache is copied inside it."""
    source = torch.ones(num_bytes // BYTES)
    target = torch.empty_like(source)
    calls = max(1, MOST_COPIED // num_bytes // 8)

    def copy() -> None:
        for _ in range(calls):
            target.copy_(source)

    return calls * 2 * num_bytes / _seconds(copy)


def _seconds(work: Callable[[], object]) -> float:
    return min(_once(work) for _ in range(REPEATS))


def _once(work: Callable[[], object]) -> float:
    # Processor time, as the rates that are compared with it: neighbours do not count.
    begin = time.process_time()
    work()
    return time.process_time() - begin


def ceiling(subject: Subject, workload: Workload) -> float:
    """Tokens/s of decoding that neither limit forbids."""
    spec = subject.spec
    keys = workload.prompt + workload.response / 2
    attention = spec.layers[0].attention
    multiply_adds = matrix_weights(spec, spec.top_k) + spec.num_layers * 2 * keys * attention.query_width
    experts = spec.num_experts
    visited = experts * (1 - (1 - spec.top_k / experts) ** workload.batch) if experts else 0
    kv = workload.batch * spec.num_layers * 2 * keys * attention.kv_width
    moved = BYTES * (matrix_weights(spec, visited) + kv)
    copied = 1 << (int(min(max(moved, LEAST_COPIED), MOST_COPIED)).bit_length() - 1)
    step = max(workload.batch * 2 * multiply_adds / flops(), moved / bandwidth(copied))
    return workload.batch / step
