"""`[alignment]`: keeping trainer and engine the same function."""

from __future__ import annotations

from typing import Literal

from miles.config.sections.base import Section


class AlignmentSection(Section):
    """Agreement between training and inference."""

    true_on_policy_mode: bool = False
    """Bit-equal trainer and engine: the log-prob gap is exactly 0 and is checked at every step."""

    use_routing_replay: bool = False
    """Replay the routes of the old log-prob pass in the training passes."""

    use_rollout_routing_replay: bool | None = None
    """R3: every pass of the trainer replays the experts that the engine chose; default: on for MoE models."""

    numerics: Literal["exact", "fast"] | None = None
    """Kernels of native trainer and engine: batch-invariant and bit-equal, or fastest; default: chosen by the
    plan."""

    recompute_logprobs_via_prefill: bool = False
    """Let the engine score finished responses again by prefill."""
