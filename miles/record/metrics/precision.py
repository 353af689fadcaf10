"""`precision/`: what rounding to a number format does."""

from __future__ import annotations

from miles.record.metrics.metric import FRACTION, Band, Metric

PRECISION: tuple[Metric, ...] = (
    *(
        Metric(f"precision/{kind}_{name}{layer}", f"{meaning}{told}", FRACTION, healthy, moved_by)
        for kind, numbers in (("weight", "weights"), ("activation", "activations"))
        for name, meaning, healthy, moved_by in (
            (
                "error",
                f"size of what rounding changed in the trainer's {numbers}, relative to the {numbers}: "
                "|rounded - exact| / |exact|",
                Band(0, 0.2),
                "number format, group size, outliers; about 0.03 for FP8, 0.1 for INT4",
            ),
            (
                "saturated_frac",
                f"fraction of {numbers} cut off at the largest number of the format",
                Band(0, 0.01),
                "outliers under scales that do not follow the peaks; 0 where they do",
            ),
            (
                "underflow_frac",
                f"fraction of non-zero {numbers} that became 0",
                None,
                "outliers that widen a scale; near 0 for FP8, about 0.1 for INT4",
            ),
        )
        for layer, told in (("", ""), ("/layer_<i>", ", for one layer, counted from 0"))
    ),
)
