"""RMSNorm of queries or of keys over all heads of a token together (MiniMax-M2); Megatron norms each head."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn


class WidthNorm(nn.Module):
    """[..., heads of this rank, d] -> the same, with a weight [heads of this rank · d].

    Tensor parallelism cuts the heads, so the mean square is joined over the ranks. The parameter is cut, not
    copied: a model with this norm must not say `qk_layernorm`, or its gradient is summed over the ranks.
    """

    def __init__(self, heads: int, hidden_size: int, config: TransformerConfig, eps: float, **_: Any) -> None:
        super().__init__()
        self._width, self._eps = heads * hidden_size, eps
        self._size = parallel_state.get_tensor_model_parallel_world_size()
        self.weight = nn.Parameter(torch.ones(self._width // self._size, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(-2).float()
        squares = flat.square().sum(-1, keepdim=True)
        if self._size > 1:
            squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
        normed = (flat * torch.rsqrt(squares / self._width + self._eps)).to(x.dtype)
        return (normed * self.weight).view(x.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """For Megatron's distributed checkpoints."""
        state = self.state_dict(prefix="", keep_vars=True)
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            state, prefix, {"weight": 0}, sharded_offsets
        )
        return sharded
