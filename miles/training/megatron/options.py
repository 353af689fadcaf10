"""Which of megatron-core's ways a trainer takes on GPUs, beside how the model is cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AttentionBackend = Literal["auto", "flash", "fused", "unfused", "local"]
Fp8Format = Literal["e4m3", "hybrid"]
Fp8Recipe = Literal["blockwise", "mxfp8", "delayed", "tensorwise"]

ALIGNED_ROWS = {"mxfp8": 32}
"""Rows that Transformer Engine's FP8 products take at once, by recipe; 16 for the others
(`megatron.core.fp8_utils.get_fp8_align_size`)."""


@dataclass(frozen=True)
class MegatronOptions:
    """Under Megatron's names, shortened.

    Attributes:
        fp8_format, fp8_recipe: Transformer Engine's FP8; None computes in the trained dtype.
        first_bf16, last_bf16: layers at both ends that FP8 leaves alone.
        grads_in_fp32: gradients add up and are reduced in fp32; else in the trained dtype.
        distributed_optimizer: every data-parallel rank keeps masters and moments of a part of its parameters.
        precision_aware: masters and moments are the optimizer's own (Transformer Engine's, or the host's).
        cpu_offload: masters and moments lie in host memory, where the step is taken.
        overlap_offload: gradients and weights are copied while the host steps.
    """

    attention_backend: AttentionBackend = "auto"
    softmax_in_fp32: bool = True
    deepep: bool = False
    fp8_format: Fp8Format | None = None
    fp8_recipe: Fp8Recipe | None = None
    first_bf16: int = 0
    last_bf16: int = 0
    grads_in_fp32: bool = True
    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    precision_aware: bool = False
    cpu_offload: bool = False
    overlap_offload: bool = False

    @property
    def aligned_rows(self) -> int:
        """Rows of a micro-batch come in multiples of this."""
        return 1 if self.fp8_format is None else ALIGNED_ROWS.get(self.fp8_recipe or "", 16)


DEFAULTS = MegatronOptions()
"""Those of a trainer without GPUs."""
