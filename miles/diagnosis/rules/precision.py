"""What the number format of training does to weights and activations."""

from __future__ import annotations

from collections.abc import Iterator

from miles.diagnosis.finding import Evidence, Fix, FixKind, Match, Severity, Tier
from miles.diagnosis.rule import rule
from miles.diagnosis.view import RecordView

KINDS = ("weight", "activation")


def _worst(view: RecordView, share: str) -> Iterator[tuple[float, str, int]]:
    """(recent mean, kind, layer) of every layer that reports `share`."""
    for kind in KINDS:
        prefix = f"precision/{kind}_{share}/layer_"
        for metric in view.history.series:
            value = view.recent_mean(metric) if metric.startswith(prefix) else None
            if value is not None:
                yield value, kind, int(metric.removeprefix(prefix))


def _beyond(view: RecordView, share: str, most: float, told: str) -> Match | None:
    """The layer with the largest share, where that is more than `most`."""
    value, kind, layer = max(_worst(view, share), default=(0.0, "", 0))
    if value <= most:
        return None
    metric = f"precision/{kind}_{share}/layer_{layer}"
    evidence = view.evidence(f"{value:.1%} of the {kind}s of layer {layer} {told}", metric)
    kept = view.setting("precision.extra_high_precision_layers_hf") or ()
    keep = Fix(
        f"keep layer {layer} in high precision on both sides",
        FixKind.RESUME,
        "the layer takes more memory",
        (("precision.extra_high_precision_layers_hf", [*kept, f"layers.{layer}."]),),
    )
    return Match(view.step, (evidence,), (keep,))


@rule(
    "FP4",
    "Numbers are cut off by their format",
    tier=Tier.NUMERICS,
    severity=Severity.WARNING,
    symptom="more than 1 % of a layer's weights or activations lie beyond the largest number of the format",
    cause="outliers under scales that do not follow the peaks of what they scale",
    remedy="smaller blocks, or the layer in BF16 on both sides",
    source="M#1679 (asked for); band ours",
    thresholds=("saturated", "mean_steps"),
)
def saturated(view: RecordView) -> Match | None:
    return _beyond(view, "saturated_frac", view.thresholds.saturated, "are cut off")


@rule(
    "FP5",
    "Numbers are lost below the smallest of their format",
    tier=Tier.NUMERICS,
    severity=Severity.WARNING,
    symptom="more than 5 % of a layer's non-zero weights or activations became 0 in a format of eight bits",
    cause="an outlier widens the scale of its block until its neighbours vanish",
    remedy="smaller blocks (MXFP8 has 32 numbers), or the layer in BF16 on both sides",
    source="band ours",
    thresholds=("underflow", "mean_steps"),
)
def underflowed(view: RecordView) -> Match | None:
    if view.setting("precision.fp8_format") is None:
        return None
    return _beyond(view, "underflow_frac", view.thresholds.underflow, "became 0")


@rule(
    "I43",
    "Fake quantisation changes nothing",
    tier=Tier.NUMERICS,
    severity=Severity.CRITICAL,
    symptom="INT4 QAT is on, and rounding changed no weight",
    cause="the weights were INT4 numbers already when the run started, and no update has moved them; or the "
    "trainer multiplies unrounded weights",
    remedy="start from the BF16 checkpoint; look at train/grad_norm and the learning rate",
    source="miles docs, int4-qat",
)
def rounds_nothing(view: RecordView) -> Match | None:
    metric = "precision/weight_error"
    series = view.series(metric)
    if not view.setting("precision.int4_qat") or not len(series) or series.values[-1] != 0:
        return None
    evidence = Evidence("the weights are equal before and after rounding", metric)
    look = Fix("start from the BF16 checkpoint", FixKind.MANUAL, "none")
    return Match(view.step, (evidence,), (look,))


RULES = (saturated, underflowed, rounds_nothing)
