"""The kernels of a plan, compiled. A compiler that fails never stops a run: torch computes instead. With
exact numerics it does so on both sides, and a worker for which it fails alone is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from miles.models.compiled import build as training
from miles.models.compiled.build import BuildFailed
from miles.orchestration.observer import Observer
from miles.planning import Plan
from miles.planning.decode_kernel import KernelPlan
from miles.rollout.native.fused import build as decoding

Build = Callable[[str], Path]


def settle(plan: Plan, observer: Observer) -> Plan:
    """The plan with its kernels in the cache; where that failed, a plan with torch that says why."""
    decode = _settled(plan.decode, decoding.library, observer)
    train = _settled(plan.train_kernel, training.library, observer)
    if (decode, train) == (plan.decode, plan.train_kernel):
        return plan
    if plan.numerics == "exact":
        assert decode is not None and train is not None, "exact kernels come in pairs"
        decode = train = train if train.compiler is None else decode
    return replace(plan, decode=decode, train_kernel=train)


def _settled(kernel: KernelPlan | None, build: Build, observer: Observer) -> KernelPlan | None:
    if kernel is None or kernel.compiler is None:
        return kernel
    try:
        build(kernel.compiler)
    except BuildFailed as failure:
        reason = f"{failure.what} ({failure.why})"
        observer.on_event("kernel_not_built", {"reason": reason})
        return replace(kernel, kernel="torch", reason=reason, compiler=None)
    return kernel


def decode_library(plan: Plan) -> Path | None:
    """The compiled kernel on the machine of this worker; None: torch decodes."""
    return _found(plan, plan.decode, decoding.library, "decodes")


def train_library(plan: Plan) -> Path | None:
    """The same for training; None: torch trains."""
    return _found(plan, plan.train_kernel, training.library, "trains")


def _found(plan: Plan, kernel: KernelPlan | None, build: Build, does: str) -> Path | None:
    if kernel is None or kernel.compiler is None:
        return None
    try:
        return build(kernel.compiler)
    except BuildFailed as failure:
        if plan.numerics == "exact":
            raise
        # Only on another machine than the driver's; its worker log is where it shows.
        print(f"torch {does} here: {failure}", file=sys.stderr)
        return None
