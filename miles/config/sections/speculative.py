"""`[speculative]`: the draft layers and their online training (the engine's side is in `[sglang]`)."""

from __future__ import annotations

from pydantic import NonNegativeFloat, PositiveInt

from miles.config.sections.base import Section


class SpeculativeSection(Section):
    """Multi-token-prediction layers, which serve as the draft of speculative decoding."""

    mtp_num_layers: PositiveInt | None = None
    """Multi-token-prediction layers to load and keep; default: none."""

    enable_mtp_training: bool = False
    """Train the MTP layers on every rollout, so that the draft follows the policy."""

    mtp_training_steps: PositiveInt | None = None
    """Tokens ahead that MTP training teaches; default: what the engine guesses, one per layer at least."""

    mtp_loss_scaling_factor: NonNegativeFloat = 0.2
    """Weight of the MTP loss; the policy gets no gradient from it."""
