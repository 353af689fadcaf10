"""`[optimizer]`: AdamW and its schedule (Megatron's names)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from miles.config.sections.base import Section

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimizerSection(Section):
    """AdamW, learning-rate schedule and gradient clipping."""

    optimizer: Literal["adam"] = "adam"
    """Optimizer: AdamW, by Megatron's name."""

    lr: NonNegativeFloat = 1e-6
    """Peak learning rate."""

    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the decay."""

    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the schedule after the warm-up."""

    lr_warmup_iters: NonNegativeInt = 0
    """Optimizer steps of linear warm-up."""

    lr_decay_iters: PositiveInt | None = None
    """Optimizer steps until `min_lr`; default: the whole run."""

    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay."""

    adam_beta1: Beta = 0.9
    """Decay of the first moment."""

    adam_beta2: Beta = 0.999
    """Decay of the second moment."""

    adam_eps: PositiveFloat = 1e-8
    """Term added to the denominator."""

    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 does not clip."""

    optimizer_cpu_offload: bool = False
    """Keep optimizer state in host memory and step there."""

    overlap_cpu_optimizer_d2h_h2d: bool = False
    """Copy gradients and weights while the host steps."""

    use_precision_aware_optimizer: bool = False
    """Hold master weights and moments in the lower precision that Transformer Engine offers."""

    reset_optimizer_states: bool = False
    """Forget the moments at the start of every rollout."""
