"""The process groups of a Megatron trainer, and its ranks as the rest of training sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from miles.data.batch import TrainBatch
from miles.errors import RunError
from miles.training.megatron import cpu
from miles.training.megatron.layout import MegatronLayout
from miles.training.native.ranks import input_digest
from miles.training.native.state import TrainerState

T = TypeVar("T")

SEED = 0
"""Of Megatron's tensor-parallel random states. Nothing draws from them: weights are loaded."""

_current: list[tuple[MegatronLayout, int]] = []


def open_groups(layout: MegatronLayout, num_layers: int) -> None:
    """Cut the ranks of this process's world as the layout says; a process without a world becomes one.

    megatron-core keeps its groups per process: trainers of one process share them and need one layout.
    """
    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        dist.init_process_group(
            "gloo" if not torch.cuda.is_available() else "nccl", store=dist.HashStore(), rank=0, world_size=1
        )
        _current.clear()
    wanted = (layout, layout.virtual_stages(num_layers) or 1)
    if _current == [wanted] and parallel_state.model_parallel_is_initialized():
        return
    parallel_state.destroy_model_parallel()
    _require_division(layout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.virtual_stages(num_layers),
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(SEED)
    _current[:] = [wanted]


def _require_division(layout: MegatronLayout) -> None:
    world, dense = dist.get_world_size(), layout.tp * layout.pp * layout.cp
    experts = layout.etp * layout.ep * layout.pp
    if world % dense or world % experts:
        raise RunError(
            f"{world} trainer processes cannot be cut into TP {layout.tp} x PP {layout.pp} x CP {layout.cp} "
            f"and ETP {layout.etp} x EP {layout.ep} x PP {layout.pp}",
            fix="choose parallel sizes whose products divide the number of trainer processes",
        )


@dataclass(frozen=True)
class MegatronRanks:
    """Data-parallel ranks, each of tp x pp processes. Implements `training.native.ranks.Ranks`.

    What a method exchanges must be known on every process of a rank, not on its last stage alone
    (`from_last_stage`).
    """

    @property
    def rank(self) -> int:
        from megatron.core import parallel_state

        return int(parallel_state.get_data_parallel_rank())

    @property
    def size(self) -> int:
        from megatron.core import parallel_state

        return int(parallel_state.get_data_parallel_world_size())

    def sum(self, values: Tensor) -> Tensor:
        from megatron.core import parallel_state

        # NCCL reduces what lies on a GPU only.
        on_gpu = torch.cuda.is_available() and self.size > 1
        total = values.detach().to("cuda" if on_gpu else values.device, copy=True)
        if self.size > 1:
            dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        return total.to(values.device)

    def gather(self, values: Tensor) -> Tensor:
        from megatron.core import parallel_state

        if self.size == 1:
            return values
        parts: list[Tensor] = [values] * self.size
        dist.all_gather_object(parts, values.detach().cpu(), group=parallel_state.get_data_parallel_group())
        return torch.cat(parts).to(values.device)

    def require_same_input(self, batch: TrainBatch, state: TrainerState) -> None:
        """Raise RunError on every process when they were not given the same batch, knobs and step."""
        if dist.get_world_size() == 1:
            return
        digests = [0] * dist.get_world_size()
        dist.all_gather_object(digests, input_digest(batch, state))
        if len(set(digests)) > 1:
            odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
            raise RunError(
                f"ranks {odd} were given another batch, step or other knobs than rank 0",
                why="all ranks take their share from the same whole rollout batch",
                fix="call every rank with the same arguments, in the same order",
            )


def from_last_stage(value: T | None) -> T:
    """What only the last pipeline stage has, without gradient, on all stages; others pass None."""
    from megatron.core import parallel_state

    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        assert value is not None
        return value
    box: list[T | None] = [value]
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast_object_list(box, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    assert box[0] is not None
    return box[0]
