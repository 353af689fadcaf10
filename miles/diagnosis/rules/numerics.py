"""Values that are not numbers, and gradients that are out of all proportion."""

from __future__ import annotations

import math
import statistics
from typing import Any

from miles.diagnosis.finding import Evidence, Fix, FixKind, Match, Severity, Tier
from miles.diagnosis.patches import CHECK_SYNC, gentler, lower_lr
from miles.diagnosis.rule import rule
from miles.diagnosis.view import RecordView
from miles.record import events as kinds

_WATCHED = (
    "train/loss",
    "train/pg_loss",
    "train/grad_norm",
    "train/kl_loss",
    "train/entropy",
    "train/aux_loss",
)


@rule(
    "NF1",
    "Non-finite values",
    tier=Tier.NUMERICS,
    severity=Severity.CRITICAL,
    symptom="a NaN or an infinity in loss, logits, log-probs, gradients or weights: any at all",
    cause="overflow (half precision, FP8 activations, a learning rate too high), the MoE load-balancing "
    "loss, or "
    "a sample that the chat template broke",
    remedy="resume from the checkpoint before the first bad step with the cause removed; the first "
    "tensor that "
    "went bad tells where to look",
    source="slime docs; S#795; DESIGN: non-finite values are never replaced silently",
    thresholds=("recent_steps",),
)
def non_finite(view: RecordView) -> Match | None:
    events = sorted(view.events(kinds.NON_FINITE), key=lambda e: (e["step"], e["time"]))
    evidence = [
        Evidence(f"step {e['step']}: {e['count']} non-finite elements in the {e['what']} of {e['tensor']}")
        for e in events[:3]
    ]
    flagged = view.flagged_steps("train/non_finite_elements")
    broken = [point for name in _WATCHED for point in _broken_values(view, name)]
    if not events:
        evidence += [
            Evidence(f"step {s}: {v:g} non-finite elements", "train/non_finite_elements")
            for s, v in flagged[:3]
        ]
        evidence += [Evidence(f"step {s}: {name} is {v}", name) for s, name, v in sorted(broken)[:3]]
    if not evidence:
        return None
    steps = [e["step"] for e in events] or [s for s, _ in flagged] + [s for s, _, _ in broken]
    skipped = view.flagged_steps("train/step_skipped")
    if skipped:
        evidence.append(
            Evidence(f"{len(skipped)} optimizer steps were skipped", "train/step_skipped", tuple(skipped))
        )
    first = min(steps)
    return Match(
        first,
        tuple(evidence),
        _fixes(view, first),
        cause=_cause(view, events, first),
        title=_title(events, first),
    )


def _broken_values(view: RecordView, name: str) -> list[tuple[int, str, float]]:
    return [(s, name, v) for s, v in view.flagged_steps(name) if not math.isfinite(v)]


def _title(events: list[dict[str, Any]], first: int) -> str:
    if not events:
        return f"Non-finite values from step {first}"
    return f"Non-finite {events[0]['what']} at step {first}: {events[0]['tensor']}"


def _cause(view: RecordView, events: list[dict[str, Any]], first: int) -> str | None:
    fault = view.setting("debug.inject_fault")
    if fault and fault.endswith(f"@{first}"):
        return f"debug.inject_fault = {fault!r} put it there on purpose"
    if events and events[0]["what"] == "weight":
        return "the weights themselves are not finite: they were read or updated wrongly before this step"
    return None


def _fixes(view: RecordView, first: int) -> tuple[Fix, ...]:
    before = view.checkpoint_before(first - 1)
    fixes = []
    if view.setting("debug.inject_fault"):
        fixes.append(_resume("do not inject the fault", "none", before, ("debug.inject_fault", None)))
    if view.setting("training.moe_aux_loss_coeff"):
        fixes.append(
            _resume(
                "train without the load-balancing loss",
                "experts may be used less evenly",
                before,
                ("training.moe_aux_loss_coeff", 0.0),
            )
        )
    if view.setting("model.dtype") == "fp16":
        fixes.append(
            _resume("compute in BF16, which overflows later", "less precise", before, ("model.dtype", "bf16"))
        )
    if (lower := lower_lr(view, 3.0, before, "train more gently")) is not None:
        fixes.append(lower)
    if view.setting("training.non_finite_policy") == "stop":
        fixes.append(
            _resume(
                "skip such a step and go on",
                "hides a cause that may come back",
                before,
                ("training.non_finite_policy", "skip"),
            )
        )
    return tuple(fixes)


def _resume(text: str, risk: str, checkpoint: int | None, *patch: tuple[str, Any]) -> Fix:
    return Fix(text, FixKind.RESUME, risk, patch, from_step=checkpoint, start_over=checkpoint is None)


@rule(
    "OP2",
    "Gradient spike",
    tier=Tier.NUMERICS,
    severity=Severity.WARNING,
    symptom="the gradient norm is more than ten times its rolling median (and above the clipping norm), "
    "or above 1000",
    cause="an outlier sample, tokens that should be masked, overflow, or weights that were synchronised "
    "wrongly",
    remedy="look at the samples of that step; gradient clipping keeps one spike harmless, many need a lower "
    "learning rate",
    source="NVIDIA-NeMo/ProRL-Agent-Server #40 (1e9 with a healthy loss); LMSYS 2026-07-29",
    thresholds=(
        "grad_spike_factor",
        "grad_spike_absolute",
        "grad_spike_window",
        "grad_spike_min_points",
        "recent_steps",
    ),
)
def gradient_spike(view: RecordView) -> Match | None:
    limits = view.thresholds
    series = view.series("train/grad_norm")
    start = 0 if view.whole else max(0, len(series) - limits.recent_steps)
    floor = view.setting("optimizer.clip_grad") or 1.0
    spikes = []
    for i in range(start, len(series)):
        value = series.values[i]
        before = [v for v in series.values[max(0, i - limits.grad_spike_window) : i] if v > 0]
        known = len(before) >= limits.grad_spike_min_points
        usual = statistics.median(before) if known else math.inf
        if limits.grad_spike_absolute < value < math.inf or (
            floor < value < math.inf and value > limits.grad_spike_factor * usual
        ):
            spikes.append((series.steps[i], value, usual))
    if not spikes:
        return None
    step, value, usual = max(spikes, key=lambda s: s[1])
    compared = f", {value / usual:.0f} times its usual {usual:.2g}" if usual < math.inf else ""
    evidence = Evidence(
        f"gradient norm {value:.3g} at step {step}{compared}",
        "train/grad_norm",
        tuple((s, v) for s, v, _ in spikes),
    )
    look = Fix(f"look at the samples of step {step}", FixKind.MANUAL, "none")
    if view.setting("optimizer.clip_grad") == 0:
        clip = Fix(
            "clip the gradient",
            FixKind.RESUME,
            "slower where gradients are honestly large",
            (("optimizer.clip_grad", 1.0),),
        )
        return Match(step, (evidence,), (clip, look))
    return Match(step, (evidence,), (look,))


@rule(
    "NF2",
    "Log ratios had to be bounded",
    tier=Tier.NUMERICS,
    severity=Severity.WARNING,
    symptom="tokens whose log ratio had to be bounded before exponentiation: any at all",
    cause="the policy has left the data so far behind that its ratio would overflow; other systems replace "
    "such values silently",
    remedy="look at the log-prob gap first; a lower learning rate, fewer steps per rollout",
    source="slime, miles (nan_to_num in ratio, KL and gap)",
    thresholds=("recent_steps",),
)
def bounded_ratios(view: RecordView) -> Match | None:
    name = "train/log_ratio_bounded"
    flagged = view.flagged_steps(name)
    if not flagged:
        return None
    step, count = max(flagged, key=lambda point: point[1])
    text = f"in {len(flagged)} steps, at most {count:g} tokens (step {step})"
    return Match(flagged[0][0], (Evidence(text, name, tuple(flagged[-5:])),), (*gentler(view), CHECK_SYNC))


RULES = (non_finite, gradient_spike, bounded_ratios)
