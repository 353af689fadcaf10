"""`[parallel]`: how one model is cut over many devices (Megatron's names)."""

from __future__ import annotations

from pydantic import PositiveInt

from miles.config.sections.base import Section


class ParallelSection(Section):
    """Sizes of the trainer's parallel dimensions; data parallelism is what is left over."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share each matrix."""

    pipeline_model_parallel_size: PositiveInt = 1
    """Pipeline stages."""

    num_layers_per_virtual_pipeline_stage: PositiveInt | None = None
    """Layers per virtual stage of the interleaved pipeline schedule; default: not interleaved."""

    decoder_first_pipeline_num_layers: PositiveInt | None = None
    """Layers of the first pipeline stage; default: an even split."""

    decoder_last_pipeline_num_layers: PositiveInt | None = None
    """Layers of the last pipeline stage; default: an even split."""

    expert_model_parallel_size: PositiveInt = 1
    """Ranks that share the experts of a layer."""

    expert_tensor_parallel_size: PositiveInt | None = None
    """Ranks that share each expert's matrices; default: the tensor-parallel size."""

    context_parallel_size: PositiveInt = 1
    """Ranks that share each sequence: two of 2 x so many chunks each, one early and one late."""

    sequence_parallel: bool = False
    """Split activations along the sequence between tensor-parallel regions."""

    use_distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks."""

    overlap_grad_reduce: bool = False
    """Reduce gradients while backward still runs."""

    overlap_param_gather: bool = False
    """Gather parameters while forward already runs; needs the distributed optimizer."""
