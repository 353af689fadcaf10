"""`[correction]`: what is done about the gap between the trainer's and the engine's probabilities."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from miles.config.sections.base import Section


class CorrectionSection(Section):
    """Importance weights w = p_trainer / p_engine of each sampled token."""

    use_tis: bool = False
    """Multiply the policy loss by bounded importance weights (truncated importance sampling)."""

    tis_clip: PositiveFloat = 2.0
    """Largest importance weight: larger ones are cut to it."""

    tis_clip_low: NonNegativeFloat = 0.0
    """Smallest importance weight: smaller ones are raised to it."""

    tis_threshold: Annotated[float | None, Field(gt=0.0, le=1.0)] = None
    """Keep weights inside [T, 1/T] as they are and mask tokens outside. Stands in place of `tis_clip` and
    `tis_clip_low`; this flag is miles' own and has no counterpart upstream."""

    tis_mode: Literal["truncate", "clip", "mask"] = "clip"
    """What happens to weights outside the bounds: `clip` cuts them to the nearer one, `truncate` to
    `tis_clip` alone, `mask` leaves tokens (or sequences, see `tis_level`) out (IcePop)."""

    tis_level: Literal["token", "sequence", "geometric"] = "token"
    """Weight of each token, product over the response, or geometric mean over it."""

    tis_batch_normalize: bool = False
    """Scale the weights of an optimizer step to mean 1, which takes a pass of its own for the old
    log-probs."""

    use_rs: bool = False
    """Rejection sampling: leave tokens or sequences whose weight is outside the bounds out of the
    whole loss."""

    rs_level: Literal["token", "sequence", "geometric"] = "token"
    """What rejection looks at, as `tis_level`."""

    rs_lower_bound: NonNegativeFloat = 0.5
    """Smallest weight that is not rejected."""

    rs_upper_bound: PositiveFloat = 2.0
    """Largest weight that is not rejected."""

    rs_veto_threshold: NonNegativeFloat | None = None
    """One token with a weight below this rejects its whole sequence; default: off."""

    custom_tis_function_path: str | None = None
    """Python path of a function used in place of the built-in correction."""

    get_mismatch_metrics: bool = False
    """Report what importance weights and rejection would do, and both sides' perplexities; what `use_tis` and
    `use_rs` do not switch on is not applied."""
