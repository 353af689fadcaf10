"""What of a model the Megatron trainer does not carry."""

from __future__ import annotations

from dataclasses import replace

from miles.arch.spec import ArchSpec, AttentionSpec, DenseMlpSpec, MoeSpec, RopeSpec

FAMILIES = (
    "deepseek_v3",
    "deepseek_v32",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "glm4_moe",
    "llama",
    "llama4",
    "llama4_text",
    "minimax_m2",
    "qwen2",
    "qwen3",
    "qwen3_moe",
)
"""Those whose weights and logits were compared in Megatron's form."""

LATENT_EPS = 1e-6
"""Of the norms of latents, in every published model; Megatron has one epsilon for all norms."""


def megatron_obstacle(spec: ArchSpec, engine: bool = False) -> str:
    """What stands in the way of the Megatron trainer; empty where nothing does.

    `engine`: in Transformer Engine's layers, not in Megatron's own.
    """
    if spec.family not in FAMILIES:
        return f"a model of the family {spec.family}"
    if spec.mtp is not None and any(layer != spec.layers[-1] for layer in spec.mtp.layers):
        return "MTP layers of another kind than the last layer"
    mlps = [layer.mlp for layer in spec.layers]
    attentions = [layer.attention for layer in spec.layers]
    if len({_common(attention) for attention in attentions}) > 1:
        return "layers that differ in heads, biases or norms of their attention"
    if len({attention.window for attention in attentions} - {None}) > 1:
        return "windows of different widths"
    if engine and any(attention.softcap is not None for attention in attentions):
        return "soft-capped attention in Transformer Engine's layers"
    if engine and any(attention.chunk is not None for attention in attentions):
        return "chunked attention in Transformer Engine's layers"
    latent = spec.layers[0].attention.latent
    if latent is not None and spec.rms_norm_eps != LATENT_EPS:
        return f"latents normed with another epsilon ({LATENT_EPS}) than the rest ({spec.rms_norm_eps})"
    if latent is not None and latent.value_dim > latent.query_dim:
        return "values wider than keys in latent attention"
    if len({mlp for mlp in mlps if isinstance(mlp, DenseMlpSpec)}) > 1:
        return "dense layers of different widths"
    return "" if spec.moe is None else _routing_obstacle(spec.moe)


def _common(attention: AttentionSpec) -> AttentionSpec:
    """What all layers must share: the rest is read layer by layer."""
    return replace(
        attention, rope=RopeSpec(1.0), window=None, chunk=None, rotates=True, qk_unit=False, temperature=None
    )


def _routing_obstacle(moe: MoeSpec) -> str:
    """Megatron divides the scores of sigmoid routers by their sum, unless a token visits one expert."""
    if moe.scoring == "sigmoid" and moe.norm_topk_prob != (moe.top_k > 1):
        return f"sigmoid routing with norm_topk_prob {moe.norm_topk_prob} to {moe.top_k} experts"
    return ""
