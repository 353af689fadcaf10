"""From our options to what megatron-core's own configurations call them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.enums import AttnBackend

from miles.training.megatron.layout import MegatronLayout
from miles.training.settings import OptimizerSettings


def engine_fields(layout: MegatronLayout, is_moe: bool) -> dict[str, Any]:
    """Fields of a TransformerConfig that only Transformer Engine's layers read; none for Megatron's own."""
    if layout.implementation != "transformer_engine":
        return {}
    options = layout.options
    fields: dict[str, Any] = {
        "transformer_impl": "transformer_engine",
        "attention_backend": AttnBackend[options.attention_backend],
        "attention_softmax_in_fp32": options.softmax_in_fp32,
    }
    if layout.cp > 1:
        fields["cp_comm_type"] = "p2p"
    if is_moe:
        # Scores of close experts differ by less than bf16 can tell.
        fields |= {"moe_router_dtype": "fp32", "moe_enable_deepep": options.deepep}
    return fields | _fp8(layout, is_moe)


def _fp8(layout: MegatronLayout, is_moe: bool) -> dict[str, Any]:
    options = layout.options
    if options.fp8_format is None:
        return {}
    ends = options.first_bf16 + options.last_bf16 > 0
    return {
        "fp8": options.fp8_format,
        "fp8_recipe": options.fp8_recipe or "delayed",
        # Weights, and gradients with them, stay in bf16 between steps: that is what engines are given.
        "fp8_param": False,
        "first_last_layers_bf16": ends,
        "num_layers_at_start_in_bf16": options.first_bf16,
        "num_layers_at_end_in_bf16": options.last_bf16,
        # An expert's share of the tokens is seldom a multiple of what an FP8 product takes.
        "moe_router_padding_for_quantization": is_moe,
    }


def ddp_config(layout: MegatronLayout) -> DistributedDataParallelConfig:
    """How gradients are kept and summed over data-parallel ranks."""
    options = layout.options
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=options.grads_in_fp32,
        use_distributed_optimizer=options.distributed_optimizer,
        overlap_grad_reduce=options.overlap_grad_reduce,
        overlap_param_gather=options.overlap_param_gather,
    )


def optimizer_config(
    settings: OptimizerSettings, layout: MegatronLayout, dtype: torch.dtype
) -> OptimizerConfig:
    """AdamW as Megatron is told of it."""
    options = layout.options
    return OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        fp8_recipe=options.fp8_recipe if options.fp8_format else None,
        use_distributed_optimizer=options.distributed_optimizer,
        overlap_param_gather=options.overlap_param_gather,
        use_precision_aware_optimizer=options.precision_aware,
        optimizer_cpu_offload=options.cpu_offload,
        # All of it or none: a part would need another arithmetic of memory.
        optimizer_offload_fraction=1.0 if options.cpu_offload else 0.0,
        overlap_cpu_optimizer_d2h_h2d=options.overlap_offload,
    )
