"""Megatron's distributed optimizer: every data-parallel rank keeps masters and moments of a part of its
parameters, on the GPU or in host memory.

A rank owns a range of the flattened elements of a parameter, which may be empty. Towards the rest of miles a
state has the parameter's shape, with zeros outside the range, and all ranks give their part of it
(`MegatronTensors.published(..., shared=optimizer.shares)`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from miles.training.megatron.optimizer import MasterAdam

MASTER_STATE = "param"
"""What the distributed optimizer calls a master."""


class ShardedAdam(MasterAdam):
    """AdamW whose fp32 masters and moments are dealt out over data-parallel ranks."""

    _staged: dict[tuple[nn.Parameter, str], Tensor] | None = None
    """Whole states, while they are filled from a checkpoint."""

    def _make_state(self) -> None:
        """A step over no gradients makes the state, whoever holds it; weights are loaded afterwards."""
        for part, group in self._groups():
            group["weight_decay"] = self._weight_decay * group["wd_mult"]
            assert isinstance(part, DistributedOptimizer)
        for part in self._shards():
            part._init_optimizer_states_with_dummy_values()
        self.set_updates(0)

    def gradient(self, parameter: nn.Parameter) -> Tensor:  # type: ignore[override]
        """This rank's part of the summed gradient, fp32 in the parameter's shape; of others all of it."""
        if not self.holds(parameter):
            return MasterAdam.gradient(parameter)
        return self._in_shape(parameter, lambda own: parameter.main_grad.view(-1)[own].float())

    def master(self, parameter: nn.Parameter) -> Tensor:  # type: ignore[override]
        """This rank's part of the fp32 weights."""
        return self._state_of(parameter, MASTER_STATE)

    def moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        """This rank's part of a moment."""
        return self._state_of(parameter, moment)

    def holds(self, parameter: nn.Parameter) -> bool:
        return any(parameter in buffer.param_to_bucket for part in self._shards() for buffer in part.buffers)

    def shares(self, parameter: nn.Parameter) -> bool:
        return self.holds(parameter)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Inside, states are whole tensors to be filled; at the end each rank keeps its part of them."""
        self._staged = {}
        yield
        staged, self._staged = self._staged, None
        for (parameter, name), whole in staged.items():
            own = self._range(parameter)
            if own is not None:
                self._keep(parameter, name, whole.view(-1)[own])

    def reset_masters(self) -> None:
        super().reset_masters()
        for part in self._shards():
            if not part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
                continue
            if isinstance(part.optimizer, HybridDeviceOptimizer):
                continue  # it was told by Megatron
            # Transformer Engine's optimizer keeps masters that Megatron leaves as they were.
            for parameter in part.model_param_gbuf_map:
                own = self._range(parameter)
                if own is not None:
                    self._keep(parameter, MASTER_STATE, parameter.detach().view(-1)[own].float())

    def set_updates(self, updates: int) -> None:
        """In the state of each tensor (torch), or of each group (Transformer Engine)."""
        for part in self._shards():
            inner = part.optimizer
            every = inner.sub_optimizers if isinstance(inner, HybridDeviceOptimizer) else [inner]
            for optimizer in every:
                for state in optimizer.state.values():
                    if torch.is_tensor(state.get("step")):
                        state["step"].fill_(updates)
                for group in optimizer.param_groups:
                    if "step" in group:
                        group["step"] = updates

    def settle(self) -> None:
        """Gather what other ranks have updated, where that waits for the next forward."""
        for chunk in self._chunks:
            chunk.start_param_sync(force_sync=True)

    def _shards(self) -> list[DistributedOptimizer]:
        return [part for part in self.parts() if isinstance(part, DistributedOptimizer)]

    def _part_of(self, parameter: nn.Parameter) -> DistributedOptimizer | None:
        """The optimizer that has this rank's elements of a parameter; None where the rank has none."""
        return next((part for part in self._shards() if parameter in part.model_param_gbuf_map), None)

    def _range(self, parameter: nn.Parameter) -> slice | None:
        """Which flattened elements are this rank's; None where none are."""
        part = self._part_of(parameter)
        if part is None:
            return None
        own = part._get_model_param_range_map(parameter)["param"]
        return slice(own.start, own.end)

    def _state_of(self, parameter: nn.Parameter, name: str) -> Tensor:
        if self._staged is not None:
            key = (parameter, name)
            if key not in self._staged:
                self._staged[key] = torch.zeros(parameter.shape, dtype=torch.float32)
            return self._staged[key]
        return self._in_shape(parameter, lambda _: self._live(parameter)[name])

    def _live(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Master and moments of this rank's elements."""
        part = self._part_of(parameter)
        assert part is not None, "asked for nothing"
        tensors: dict[str, Tensor] = part._get_main_param_and_optimizer_states(parameter)
        return tensors

    def _in_shape(self, parameter: nn.Parameter, of: Any) -> Tensor:
        whole = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        own = self._range(parameter)
        if own is not None:
            whole.view(-1)[own] = of(own).detach().to(whole)
        return whole

    def _keep(self, parameter: nn.Parameter, name: str, values: Tensor) -> None:
        part = self._part_of(parameter)
        assert part is not None, "there is nothing to keep"
        scaled = getattr(part.optimizer, "set_scaled_state", None)
        if scaled is None or not part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
            self._live(parameter)[name].data.copy_(values)
            return
        group, order = part.model_param_group_index_map[parameter]
        shard = part.optimizer.param_groups[group]["params"][order]
        state = "master_param" if name == MASTER_STATE else name
        scaled(shard, state, values.to(shard.device))
