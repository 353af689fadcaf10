"""Weights for `/update_weights_from_tensor` by handle: tensors that a server on the same GPUs opens in place.

A payload is base64 of a pickled list of (name, tensor), a CUDA tensor as the handle of its memory
(`torch.multiprocessing.reductions`). The GPU is named by its UUID, because each process numbers those that it
sees for itself; SGLang reads it so (`sglang.srt.utils.patch_torch`). The sender keeps the tensors until the
server has answered.
"""

from __future__ import annotations

import base64
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing import reductions

from miles.rollout.sglang.weight_payload import Bucket

DEVICE = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters).index("storage_device")
"""Where a handle says on which GPU it lies."""


def encode_handles(bucket: Bucket) -> str:
    """The bucket as text; its tensors stay where they are."""
    buffer = io.BytesIO()
    _HandlePickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(
        [(name, tensor.detach()) for name, tensor in bucket]
    )
    return base64.b64encode(buffer.getvalue()).decode("ascii")


class _HandlePickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if not (isinstance(value, torch.Tensor) and value.is_cuda):
            return NotImplemented
        rebuild, arguments = reductions.reduce_tensor(value)
        return rebuild, by_uuid(arguments, _uuid)


def by_uuid(arguments: tuple[Any, ...], uuid: Callable[[int], str]) -> tuple[Any, ...]:
    """The arguments of `rebuild_cuda_tensor` with the GPU under its own name."""
    return (*arguments[:DEVICE], uuid(arguments[DEVICE]), *arguments[DEVICE + 1 :])


def _uuid(device: int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)
