"""The kernels of a plan, compiled. A compiler that fails never stops a run: torch computes instead. With
exact numerics it does so on both sides, also where both were compiled and are not exact (`kernel_probe`), and
a worker for which it fails alone is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from miles.arch import load_spec
from miles.models.compiled import build as training
from miles.models.compiled.build import BuildFailed
from miles.models.compiled.exact import CompiledExactNumerics
from miles.models.compiled.library import Library
from miles.orchestration.kernel_probe import kernels_part
from miles.orchestration.observer import Observer
from miles.planning import Plan
from miles.planning.decode_kernel import KernelPlan
from miles.rollout.native.fused import build as decoding

Build = Callable[[str], Path]


def settle(plan: Plan, observer: Observer, model: Path) -> Plan:
    """The plan with its kernels in the cache; where that failed, a plan with torch that says why. `model`:
    the checkpoint of the run."""
    decode = _settled(plan.decode, decoding.library, observer)
    train = _settled(plan.train_kernel, training.library, observer)
    if plan.numerics == "exact" and decode is not None and train is not None:
        decode, train = _settled_exact(decode, train, observer, model)
    if (decode, train) == (plan.decode, plan.train_kernel):
        return plan
    return replace(plan, decode=decode, train_kernel=train)


def _settled_exact(
    decode: KernelPlan, train: KernelPlan, observer: Observer, model: Path
) -> tuple[KernelPlan, KernelPlan]:
    """Both or neither."""
    if decode.compiler is None or train.compiler is None:
        torchs = train if train.compiler is None else decode
        return torchs, torchs
    numerics = CompiledExactNumerics(Library(training.library(train.compiler)))
    where = kernels_part(load_spec(model), numerics, decoding.library(decode.compiler))
    if where is None:
        return decode, train
    reason = f"compiled kernels are not exact on this machine: {where}"
    observer.on_event("kernel_not_exact", {"reason": reason})
    torchs = KernelPlan("torch", reason)
    return torchs, torchs


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
