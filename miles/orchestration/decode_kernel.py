"""The decode kernel of a plan, compiled. A compiler that fails never stops a run: torch decodes instead."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from miles.orchestration.observer import Observer
from miles.planning import Plan
from miles.rollout.native.fused.build import BuildFailed, library


def settle(plan: Plan, observer: Observer) -> Plan:
    """The plan with its kernel in the cache; where that failed, a plan with torch that says why."""
    if plan.decode is None or plan.decode.compiler is None:
        return plan
    try:
        library(plan.decode.compiler)
    except BuildFailed as failure:
        reason = f"{failure.what} ({failure.why})"
        observer.on_event("kernel_not_built", {"reason": reason})
        return replace(plan, decode=replace(plan.decode, kernel="torch", reason=reason, compiler=None))
    return plan


def decode_library(plan: Plan) -> Path | None:
    """The compiled kernel on the machine of this worker; None: torch decodes."""
    if plan.decode is None or plan.decode.compiler is None:
        return None
    try:
        return library(plan.decode.compiler)
    except BuildFailed as failure:
        # Only on another machine than the driver's; its worker log is where it shows.
        print(f"torch decodes here: {failure}", file=sys.stderr)
        return None
