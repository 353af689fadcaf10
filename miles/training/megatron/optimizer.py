"""Megatron's optimizer over the chunks of this process: fp32 masters and moments, one global norm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module, MegatronModule
from torch import Tensor, nn

from miles.training.megatron.core_config import ddp_config, optimizer_config
from miles.training.megatron.layout import MegatronLayout
from miles.training.megatron.model import keep_biases_in_fp32
from miles.training.settings import OptimizerSettings

MOMENTS = ("exp_avg", "exp_avg_sq")


def wrapped_for_training(
    chunks: Sequence[MegatronModule], config: TransformerConfig, layout: MegatronLayout
) -> list[DistributedDataParallel]:
    """Chunks whose gradients add up in fp32 buffers and are summed over data-parallel ranks."""
    low_precision = config.params_dtype != torch.float32
    ddp = ddp_config(layout)
    wrapped = [
        DistributedDataParallel(config, ddp, Float16Module(config, chunk) if low_precision else chunk)
        for chunk in chunks
    ]
    for chunk in chunks:
        keep_biases_in_fp32(chunk)
    if ddp.overlap_grad_reduce:
        # Gradients are reduced while the last micro-batch goes backward, not while others do.
        silent = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = silent[0] if len(silent) == 1 else silent
    return wrapped


class MasterAdam:
    """AdamW on fp32 masters. A master *is* the model's parameter where that is fp32 already."""

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        settings: OptimizerSettings,
        dtype: torch.dtype,
        layout: MegatronLayout,
    ) -> None:
        self._chunks, self.dtype = chunks, dtype
        self._clip_grad, self._weight_decay = settings.clip_grad, settings.weight_decay
        config = optimizer_config(settings, layout, dtype)
        self._optimizer = get_megatron_optimizer(
            config, list(chunks), get_standard_config_overrides(config), use_gloo_process_groups=False
        )
        self._make_state()

    def _make_state(self) -> None:
        for optimizer, group in self._groups():
            group["weight_decay"] = self._weight_decay * group["wd_mult"]
            for master in group["params"]:
                state = optimizer.optimizer.state[master]
                state["step"] = torch.zeros((), dtype=torch.float32)
                state.update({moment: torch.zeros_like(master.data) for moment in MOMENTS})
        self._state = {
            master: optimizer.optimizer.state[master]
            for optimizer, group in self._groups()
            for master in group["params"]
        }

    def begin(self) -> None:
        """Clear the gradient buffers."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()

    def global_norm(self) -> float:
        """The 2-norm over all gradients of the model, once they are summed over the ranks."""
        self.prepare()
        return float(self._optimizer.get_grad_norm())

    def prepare(self) -> None:
        """Hand the summed gradients to the masters, before `apply`."""
        self._optimizer.prepare_grads()

    def apply(self, learning_rate: float, norm: float) -> None:
        """Clip to `clip_grad` given the global norm, and update masters and model."""
        for _, group in self._groups():
            group["lr"] = learning_rate
        if self._clip_grad > 0:
            for optimizer in self.parts():
                decoupled = optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                clip_grad_by_total_norm_fp32(optimizer.get_parameters(), self._clip_grad, norm, decoupled)
        self._optimizer.step_with_ready_grads()

    @staticmethod
    def gradient(parameter: nn.Parameter) -> Tensor:
        """The fp32 gradient of a parameter, summed over micro-batches and ranks; 0 for a router's bias."""
        gradient: Tensor | None = getattr(parameter, "main_grad", None)
        return torch.zeros_like(parameter) if gradient is None else gradient

    @staticmethod
    def master(parameter: nn.Parameter) -> nn.Parameter:
        """The fp32 weights behind a parameter."""
        master: nn.Parameter = getattr(parameter, "main_param", parameter)
        return master

    def moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        """One of `MOMENTS` of a parameter, live; 0 for a router's bias, which is never updated."""
        state: dict[str, Tensor] | None = self._state.get(self.master(parameter))
        return torch.zeros_like(parameter) if state is None else state[moment]

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether it is this optimizer that updates a parameter."""
        return self.master(parameter) in self._state

    def shares(self, parameter: nn.Parameter) -> bool:
        """Whether each data-parallel rank has a part of this parameter's state only."""
        return False

    def loading(self) -> AbstractContextManager[None]:
        """While states are filled from a checkpoint: they are live here."""
        return nullcontext()

    def settle(self) -> None:
        """The weights are whole after a step."""

    def reset_masters(self) -> None:
        """Take the model's weights as the masters', after weights were loaded into the model."""
        self._optimizer.reload_model_params()

    def set_updates(self, updates: int) -> None:
        """Restore the count that bias correction reads."""
        for state in self._state.values():
            state["step"].fill_(updates)

    def parts(self) -> list[MegatronOptimizer]:
        """Dense and expert parameters have an optimizer each, where their ranks differ."""
        chained = isinstance(self._optimizer, ChainedOptimizer)
        parts = self._optimizer.chained_optimizers if chained else [self._optimizer]
        return [part for part in parts if not part.is_stub_optimizer]

    def _groups(self) -> Iterator[tuple[MegatronOptimizer, dict[str, Any]]]:
        return ((part, group) for part in self.parts() for group in part.param_groups)
