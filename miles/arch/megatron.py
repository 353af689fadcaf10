"""What of a model the Megatron trainer does not carry."""

from __future__ import annotations

from miles.arch.spec import ArchSpec, DenseMlpSpec, MoeSpec

FAMILIES = ("deepseek_v3", "glm4_moe", "llama", "minimax_m2", "qwen2", "qwen3", "qwen3_moe")
"""Those whose weights and logits were compared in Megatron's form."""

LATENT_EPS = 1e-6
"""Of the norms of latents, in every published model; Megatron has one epsilon for all norms."""


def megatron_obstacle(spec: ArchSpec) -> str:
    """What stands in the way of the Megatron trainer; empty where nothing does."""
    if spec.family not in FAMILIES:
        return f"a model of the family {spec.family}"
    if spec.mtp is not None and any(layer != spec.layers[-1] for layer in spec.mtp.layers):
        return "MTP layers of another kind than the last layer"
    mlps = [layer.mlp for layer in spec.layers]
    if len({layer.attention for layer in spec.layers}) > 1:
        return "layers that differ in their attention"
    latent = spec.layers[0].attention.latent
    if latent is not None and spec.rms_norm_eps != LATENT_EPS:
        return f"latents normed with another epsilon ({LATENT_EPS}) than the rest ({spec.rms_norm_eps})"
    if latent is not None and latent.value_dim > latent.query_dim:
        return "values wider than keys in latent attention"
    if len({mlp for mlp in mlps if isinstance(mlp, DenseMlpSpec)}) > 1:
        return "dense layers of different widths"
    return "" if spec.moe is None else _routing_obstacle(spec.moe)


def _routing_obstacle(moe: MoeSpec) -> str:
    """Megatron divides the scores of sigmoid routers by their sum, unless a token visits one expert."""
    if moe.scoring == "sigmoid" and moe.norm_topk_prob != (moe.top_k > 1):
        return f"sigmoid routing with norm_topk_prob {moe.norm_topk_prob} to {moe.top_k} experts"
    return ""
