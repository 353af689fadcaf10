"""A whole model in this process's chunks, for training or as a reference."""

from __future__ import annotations

import torch

from miles.arch.spec import ArchSpec
from miles.training.megatron.layout import MegatronLayout
from miles.training.megatron.model import build_chunks
from miles.training.megatron.optimizer import wrapped_for_training
from miles.training.megatron.passes import Chunks
from miles.training.megatron.transformer_config import transformer_config
from miles.training.settings import TrainerSettings


def built(
    spec: ArchSpec,
    layout: MegatronLayout,
    settings: TrainerSettings,
    dtype: torch.dtype,
    device: torch.device,
) -> Chunks:
    """A frozen model without weights."""
    config = transformer_config(spec, layout, settings, dtype)
    bare = [chunk.to(dtype).requires_grad_(False) for chunk in build_chunks(spec, layout, config, device)]
    return Chunks(spec, layout, bare, bare)


def training_chunks(
    spec: ArchSpec,
    layout: MegatronLayout,
    settings: TrainerSettings,
    dtype: torch.dtype,
    device: torch.device,
) -> Chunks:
    """A model without weights, wrapped for training."""
    config = transformer_config(spec, layout, settings, dtype)
    bare = build_chunks(spec, layout, config, device)
    return Chunks(spec, layout, wrapped_for_training(bare, config, layout), bare)
