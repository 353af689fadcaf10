"""What of a model the Megatron trainer does not carry."""

from __future__ import annotations

from miles.arch.spec import ArchSpec, DenseMlpSpec

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
"""Those whose weights and logits were compared in Megatron's form."""


def megatron_obstacle(spec: ArchSpec) -> str:
    """What stands in the way of the Megatron trainer; empty where nothing does."""
    if spec.family not in FAMILIES:
        return f"a model of the family {spec.family}"
    if spec.mtp is not None and any(layer != spec.layers[-1] for layer in spec.mtp.layers):
        return "MTP layers of another kind than the last layer"
    mlps = [layer.mlp for layer in spec.layers]
    if len({layer.attention for layer in spec.layers}) > 1:
        return "layers that differ in their attention"
    if spec.layers[0].attention.rope.width is not None:
        return "rotation of a part of each head"
    if len({mlp for mlp in mlps if isinstance(mlp, DenseMlpSpec)}) > 1:
        return "dense layers of different widths"
    return ""
