"""What a model is: ArchSpec, one file per family, shipped specs of public models."""

from __future__ import annotations

from miles.arch.checkpoint import (
    check_shapes,
    check_weights,
    load_spec,
    optional_copies,
    published_tensors,
    spec_from_hf_config,
    to_hf_config,
    with_mtp,
    with_mtp_depth,
)
from miles.arch.spec import (
    ArchSpec,
    AttentionSpec,
    DenseMlpSpec,
    Dtype,
    LayerSpec,
    MoeSpec,
    MtpSpec,
    RopeSpec,
)

__all__ = [
    "ArchSpec",
    "AttentionSpec",
    "DenseMlpSpec",
    "Dtype",
    "LayerSpec",
    "MoeSpec",
    "MtpSpec",
    "RopeSpec",
    "check_shapes",
    "check_weights",
    "load_spec",
    "optional_copies",
    "published_tensors",
    "spec_from_hf_config",
    "to_hf_config",
    "with_mtp",
    "with_mtp_depth",
]
