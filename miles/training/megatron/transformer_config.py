"""From an ArchSpec to megatron-core's TransformerConfig."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from torch import Tensor

from miles.arch.spec import ArchSpec, AttentionSpec, DenseMlpSpec, YarnScaling
from miles.training.megatron.core_config import engine_fields
from miles.training.megatron.layout import MegatronLayout
from miles.training.settings import TrainerSettings


def transformer_config(
    spec: ArchSpec, layout: MegatronLayout, settings: TrainerSettings, dtype: torch.dtype
) -> TransformerConfig:
    """The configuration of a model that `layout.require_expressible` lets pass.

    Losses come weighted over the whole optimizer step, so gradients are sums over micro-batches and ranks
    (`calculate_per_token_loss`). All weights are loaded; yet initialisation must not be switched off, since
    it marks the parameters that tensor parallelism cuts, and without the mark the norm leaves them out.
    """
    attention = spec.layers[0].attention
    engine = layout.implementation == "transformer_engine"
    with warnings.catch_warnings():
        # It deprecates a default of its own.
        warnings.simplefilter("ignore", UserWarning)
        return (TransformerConfig if attention.latent is None else MLATransformerConfig)(
            num_layers=spec.num_layers,
            hidden_size=spec.hidden_size,
            num_attention_heads=attention.num_heads,
            num_query_groups=attention.num_heads if attention.latent else attention.num_kv_heads,
            kv_channels=attention.latent.query_dim if attention.latent else attention.head_dim,
            add_bias_linear=False,
            add_qkv_bias=attention.qkv_bias,
            qk_layernorm=_norms_queries(attention),
            normalization="RMSNorm",
            layernorm_zero_centered_gamma=spec.norm_plus_one,
            layernorm_epsilon=spec.rms_norm_eps,
            gated_linear_unit=True,
            softmax_scale=None if attention.latent else attention.scale,
            rotary_interleaved=attention.latent is None and attention.rope.interleaved,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.virtual_stages(spec.num_layers),
            num_layers_in_first_pipeline_stage=layout.first_stage_layers,
            num_layers_in_last_pipeline_stage=layout.last_stage_layers,
            context_parallel_size=layout.cp,
            sequence_parallel=layout.sequence_parallel,
            variable_seq_lengths=layout.pp > 1,
            moe_token_dispatcher_type=layout.dispatcher,
            overlap_p2p_comm=layout.virtual_stage_layers is not None,
            batch_p2p_comm=layout.virtual_stage_layers is None,
            calculate_per_token_loss=True,
            init_method=_left_alone,
            output_layer_init_method=_left_alone,
            embedding_init_method=_left_alone,
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
            apply_rope_fusion=engine and _fuses_rotation(attention),
            bias_dropout_fusion=False,
            mtp_num_layers=spec.mtp_num_layers or None,
            **_windows(spec),
            **_mlp(spec, layout),
            **_latent(attention),
            **_recompute(spec, settings),
            **engine_fields(layout, spec.is_moe),
        )


def _left_alone(weight: Tensor) -> Tensor:
    return weight


def _norms_queries(attention: AttentionSpec) -> bool:
    return attention.latent is not None or (attention.qk_norm and attention.qk_norm_over == "head")


def _fuses_rotation(attention: AttentionSpec) -> bool:
    """For latent attention megatron-core has the fused one with YaRN alone; with an indexer, angles are given
    row by row.
    """
    return attention.latent is None or (attention.rope.scaling is not None and attention.indexer is None)


def _windows(spec: ArchSpec) -> dict[str, Any]:
    """Of which layers a token sees so many before it, and none behind it."""
    windows = [layer.attention.window for layer in spec.layers]
    width = next((window for window in windows if window is not None), None)
    if width is None:
        return {}
    windowed = [int(window is not None) for window in windows]
    return {"window_size": (width - 1, 0), "window_attn_skip_freq": windowed}


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation."""
    return F.gelu(x, approximate="tanh")


def _latent(attention: AttentionSpec) -> dict[str, Any]:
    latent, scaling = attention.latent, attention.rope.scaling
    if latent is None:
        return {}
    fields: dict[str, Any] = {
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_head_dim": latent.plain_dim,
        "qk_pos_emb_head_dim": latent.rotated_dim,
        "v_head_dim": latent.value_dim,
        "rotary_base": attention.rope.theta,
        "rope_type": "rope",
    }
    if isinstance(scaling, YarnScaling):
        fields |= {
            "rope_type": "yarn",
            "rotary_scaling_factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_positions,
            "beta_fast": scaling.fast_turns,
            "beta_slow": scaling.slow_turns,
            "mscale": scaling.mscale,
            "mscale_all_dim": scaling.mscale_all_dim,
        }
    return fields


def _mlp(spec: ArchSpec, layout: MegatronLayout) -> dict[str, Any]:
    dense = [layer.mlp for layer in spec.layers if isinstance(layer.mlp, DenseMlpSpec)]
    width = dense[0].intermediate_size if dense else 4 * spec.hidden_size
    by_tanh = bool(dense) and dense[0].activation == "gelu_tanh"
    fields = {"ffn_hidden_size": width, "activation_func": gelu_tanh if by_tanh else F.silu}
    moe = spec.moe
    if moe is None:
        return fields
    return fields | {
        "num_moe_experts": moe.num_experts,
        "moe_layer_freq": [int(index in spec.moe_layers) for index in range(spec.num_layers)],
        "moe_ffn_hidden_size": moe.intermediate_size,
        "moe_router_topk": moe.top_k,
        # Normalised probabilities of the chosen are the softmax over their logits alone.
        "moe_router_pre_softmax": moe.scoring == "softmax" and not moe.norm_topk_prob,
        "moe_router_score_function": moe.scoring,
        # Biases stay as published: the native trainer leaves them too.
        **(
            {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.0}
            if moe.correction_bias
            else {}
        ),
        "moe_router_num_groups": moe.num_groups if moe.num_groups > 1 else None,
        "moe_router_group_topk": moe.top_groups if moe.num_groups > 1 else None,
        "moe_router_topk_scaling_factor": None if moe.routed_scaling == 1.0 else moe.routed_scaling,
        "moe_apply_probs_on_input": moe.scales_inputs,
        "moe_shared_expert_intermediate_size": moe.shared_size or None,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_enable_routing_replay": True,
        "moe_grouped_gemm": layout.implementation == "transformer_engine",
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
    }


def _recompute(spec: ArchSpec, settings: TrainerSettings) -> dict[str, Any]:
    if settings.recompute_num_layers:
        whole = settings.recompute_num_layers == spec.num_layers
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform" if whole else "block",
            "recompute_num_layers": 1 if whole else settings.recompute_num_layers,
        }
    if settings.recompute_modules:
        return {"recompute_granularity": "selective", "recompute_modules": sorted(settings.recompute_modules)}
    return {}
