"""The rule base, in the order in which it is told."""

from __future__ import annotations

from miles.diagnosis.rule import Rule
from miles.diagnosis.rules import (
    collapse,
    critic,
    data,
    engine,
    exceptions,
    hacking,
    identity,
    importance,
    liveness,
    mismatch,
    numerics,
    optimisation,
    overshoot,
    policy,
    precision,
    rollout,
    routing,
    throughput,
)

RULES: tuple[Rule, ...] = (
    *liveness.RULES,
    *exceptions.RULES,
    *numerics.RULES,
    *precision.RULES,
    *identity.RULES,
    *mismatch.RULES,
    *importance.RULES,
    *routing.RULES,
    *engine.RULES,
    *data.RULES,
    *hacking.RULES,
    *collapse.RULES,
    *overshoot.RULES,
    *optimisation.RULES,
    *critic.RULES,
    *policy.RULES,
    *rollout.RULES,
    *throughput.RULES,
)

BY_ID = {rule.id: rule for rule in RULES}
