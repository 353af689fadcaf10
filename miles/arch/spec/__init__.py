"""What a model is, as frozen data: everything that needs to know an architecture reads these classes.

All sizes are counts (heads, experts, layers) or widths in elements. Nothing here loads weights or torch.
"""

from __future__ import annotations

from miles.arch.spec.attention import AttentionSpec, IndexerSpec, LatentSpec, QkNormOver, QueryTemperature
from miles.arch.spec.mlp import Activation, DenseMlpSpec, MoeSpec, Scoring
from miles.arch.spec.model import ArchSpec, Dtype, LayerSpec, MtpSpec, StreamsSpec
from miles.arch.spec.rope import LinearScaling, Llama3Scaling, RopeSpec, YarnScaling

__all__ = [
    "Activation",
    "ArchSpec",
    "AttentionSpec",
    "DenseMlpSpec",
    "Dtype",
    "IndexerSpec",
    "LatentSpec",
    "LayerSpec",
    "LinearScaling",
    "Llama3Scaling",
    "MoeSpec",
    "MtpSpec",
    "QkNormOver",
    "QueryTemperature",
    "RopeSpec",
    "Scoring",
    "StreamsSpec",
    "YarnScaling",
]
