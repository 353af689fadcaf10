"""A decoder sharded over the ranks with FSDP2 (https://arxiv.org/abs/2304.11277, torch's `fully_shard`).

Each layer is a unit that is gathered for its forward and backward; embedding, final norm and head are the
root's. Shards are fp32: for a bf16 model they are the master weights, and bf16 exists in flight only.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from miles.arch.spec import ArchSpec
from miles.models.decoder import Decoder
from miles.models.mtp import MtpDraft
from miles.training.native.process_group import DataParallel


def sharded_decoder(spec: ArchSpec, dtype: torch.dtype, parallel: DataParallel) -> Decoder:
    """A decoder whose forward and backward run in `dtype`, uninitialised, never whole in one process.

    Backward leaves on every rank the *sum* of all ranks' gradients, fp32, cut like the parameters.
    """
    with torch.device("meta"):
        decoder = Decoder(spec, dtype=torch.float32)
    for layer in decoder.layers:
        _shard(layer, parallel, dtype, reshard_after_forward=True)
    # The head follows the decoder's forward, so the root stays gathered until backward.
    _shard(decoder, parallel, dtype, reshard_after_forward=False)
    return decoder.to_empty(device=parallel.device)


def sharded_draft(spec: ArchSpec, dtype: torch.dtype, parallel: DataParallel) -> MtpDraft:
    """The same for MTP layers, which run forward once per depth and then backward."""
    with torch.device("meta"):
        draft = MtpDraft(spec, dtype=torch.float32)
    _shard(draft, parallel, dtype, reshard_after_forward=False)
    return draft.to_empty(device=parallel.device)


def _shard(
    module: nn.Module, parallel: DataParallel, dtype: torch.dtype, reshard_after_forward: bool
) -> None:
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    # Router biases and indexers are small, and get no gradient; biases are never rounded.
    frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
    unit = fully_shard(
        module,
        mesh=parallel.mesh,
        mp_policy=policy,
        reshard_after_forward=reshard_after_forward,
        ignored_params=frozen,
    )
    assert isinstance(unit, FSDPModule)
    # FSDP averages over ranks by default. Token weights span the whole step here, so gradients are summed.
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)
