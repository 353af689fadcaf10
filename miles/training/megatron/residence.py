"""Where the tensors of a Megatron trainer lie while engines have its GPUs: all there, weights alone, or none.

Gradients are not kept: their buffers come back empty. Masters and moments that lie in host memory anyway
(`optimizer_cpu_offload`) stay there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import nn

Held = Literal["nothing", "weights", "everything"]


def hold(
    held: Held,
    wrapped: Sequence[DistributedDataParallel],
    optimizers: Iterable[MegatronOptimizer],
    references: Iterable[nn.Module],
    device: torch.device,
) -> None:
    """Move what is not in its place. Every rank calls it; nothing is exchanged."""
    with_weights, with_all = held != "nothing", held == "everything"
    for buffer in _buffers(wrapped):
        if with_weights:
            buffer.reload_from_cpu(move_params=True, move_grads=with_all)
        buffer.offload_to_cpu(move_params=not with_weights, move_grads=not with_all)
    for chunk in wrapped:
        _move_loose(chunk, device if with_weights else torch.device("cpu"))
    place = device if with_all else torch.device("cpu")
    for part in optimizers:
        _move_state(part, place)
    for reference in references:
        reference.to(place)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _buffers(wrapped: Iterable[DistributedDataParallel]) -> Iterable[Any]:
    return chain.from_iterable((*chunk.buffers, *chunk.expert_parallel_buffers) for chunk in wrapped)


def _move_loose(chunk: DistributedDataParallel, place: torch.device) -> None:
    """Weights that lie in no buffer: those without a distributed optimizer, and what is not trained."""
    kept = {
        parameter
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        if buffer.param_data is not None
        for parameter in buffer.param_to_bucket
    }
    for tensor in chunk.parameters():
        if tensor not in kept:
            tensor.data = tensor.data.to(place)


def _move_state(part: MegatronOptimizer, place: torch.device) -> None:
    """Masters where they are tensors of their own, and moments; never views of the weights."""
    if part.config.optimizer_cpu_offload:
        return
    inner = part.optimizer
    if not part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
        for group in inner.param_groups:
            for master in group["params"]:
                if master.dtype != part.config.params_dtype:
                    master.data = master.data.to(place)
    for state in inner.state.values():
        for name, value in state.items():
            if torch.is_tensor(value) and value.dim():
                state[name] = value.to(place)
