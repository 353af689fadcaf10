"""`[training]`: how a rollout becomes optimizer steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import NonNegativeFloat, PositiveInt

from miles.config.sections.base import Flag, Fraction, Section, Strings


class TrainingSection(Section):
    """Batching, memory and numerics of the trainer."""

    backend: Annotated[Literal["native", "megatron"], Flag("--train-backend")] = "native"
    """Trainer: miles' own, or megatron-core."""

    data_parallel_size: PositiveInt = 1
    """Processes of the native trainer on CPU: each holds a shard of the model and trains on a share of every
    batch (FSDP2)."""

    global_batch_size: PositiveInt | None = None
    """Samples per optimizer step; default: derived from the other three of the four knobs."""

    num_steps_per_rollout: PositiveInt | None = None
    """Optimizer steps per rollout; default: derived, 1 where it is free."""

    micro_batch_size: PositiveInt = 1
    """Samples per forward pass, unless the token budget decides."""

    use_dynamic_batch_size: bool = False
    """Fill micro-batches up to `max_tokens_per_gpu` instead of counting samples."""

    max_tokens_per_gpu: PositiveInt | None = None
    """Tokens per micro-batch and device; a sequence counts by its share where ranks share it."""

    log_probs_max_tokens_per_gpu: PositiveInt | None = None
    """Tokens per micro-batch of passes without gradient; default: `max_tokens_per_gpu`."""

    log_probs_chunk_size: int = -1
    """Tokens whose logits exist at once; -1 lets the trainer choose."""

    balance_data: bool = False
    """Spread samples over data-parallel ranks so that each gets the same number of tokens."""

    non_finite_policy: Literal["skip", "stop"] = "skip"
    """A non-finite loss or gradient: skip the step and record it, or end the run."""

    train_kernel: Literal["auto", "torch", "fused"] = "auto"
    """What computes attention of short sequences, narrow experts and norms in the native trainer: `fused`, a
    kernel compiled on first use, or `torch`. `auto` takes the kernel where there is a compiler and the
    trainer runs in fp32 on one CPU thread. With exact numerics it computes every forward, where the decode
    kernel is taken too. The two round differently."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in backward instead of keeping them; default: keep."""

    recompute_method: Literal["uniform", "block"] | None = None
    """How `full` recompute picks layers."""

    recompute_num_layers: PositiveInt | None = None
    """Layers per recomputed chunk (`uniform`), or layers recomputed per stage (`block`)."""

    recompute_modules: Strings | None = None
    """What `selective` recompute runs again: attention between its projections (core_attn, the default),
    dense blocks (mlp), experts (moe)."""

    recompute_loss_function: bool = False
    """Recompute the logits in backward as well."""

    attention_backend: Literal["auto", "flash", "fused", "unfused", "local"] = "auto"
    """Attention kernel of the Megatron trainer."""

    attention_softmax_in_fp32: bool = False
    """Compute the softmax of the attention in FP32 in the Megatron trainer."""

    attention_dropout: Fraction = 0.0
    """Dropout of attention weights."""

    hidden_dropout: Fraction = 0.0
    """Dropout of hidden states."""

    transformer_impl: Literal["transformer_engine", "local"] | None = None
    """Layers of the Megatron trainer; default: Transformer Engine's on GPU, Megatron's own on CPU."""

    accumulate_allreduce_grads_in_fp32: bool = False
    """Accumulate and reduce gradients in FP32 in the Megatron trainer."""

    no_gradient_accumulation_fusion: bool = False
    """Do not fuse weight gradients into the accumulation in the Megatron trainer."""

    qkv_format: Literal["thd", "bshd"] = "thd"
    """`thd`: packed sequences; `bshd`: padded ones."""

    moe_aux_loss_coeff: NonNegativeFloat = 0.0
    """Coefficient of the load-balancing loss of MoE layers."""

    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = "alltoall"
    """How tokens reach their experts across ranks in the Megatron trainer."""

    moe_grouped_gemm: bool = False
    """Run the experts of a rank as one grouped matrix product in the Megatron trainer."""

    moe_enable_deepep: bool = False
    """Use DeepEP for the `flex` dispatcher of the Megatron trainer."""

    custom_model_provider_path: str | None = None
    """Python path of a function that builds the Megatron model."""
