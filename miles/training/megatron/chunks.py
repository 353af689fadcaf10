"""A whole model in this process's chunks, for training or as a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule

from miles.arch.spec import ArchSpec
from miles.training.draft_course import DraftCourse
from miles.training.megatron.draft import DraftTraining
from miles.training.megatron.draft_model import DraftModel
from miles.training.megatron.layout import MegatronLayout
from miles.training.megatron.model import PolicyModel, build_chunks, keep_biases_in_fp32
from miles.training.megatron.optimizer import MasterAdam, wrapped_for_training
from miles.training.megatron.options import DEFAULTS
from miles.training.megatron.passes import Chunks
from miles.training.megatron.pieces import Shard
from miles.training.megatron.places import draft_places, places
from miles.training.megatron.rounded_weights import RoundedLayers, fake_quantise, int4_policy
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
    for chunk in bare:
        keep_biases_in_fp32(chunk)
    return Chunks(spec, layout, bare, bare, _rounded(bare, spec, settings))


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
    rounded = _rounded(bare, spec, settings)
    return Chunks(spec, layout, wrapped_for_training(bare, config, layout), bare, rounded)


def _rounded(bare: Sequence[PolicyModel], spec: ArchSpec, settings: TrainerSettings) -> RoundedLayers:
    layers: RoundedLayers = {}
    for chunk in bare:
        layers |= fake_quantise(int4_policy(settings), chunk, places(chunk, spec, Shard.current()))
    return layers


def built_draft(
    spec: ArchSpec,
    layout: MegatronLayout,
    settings: TrainerSettings,
    dtype: torch.dtype,
    device: torch.device,
) -> DraftModel | None:
    """The MTP layers without weights, frozen; None where the model has none, or not on this stage."""
    if spec.mtp is None or not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return None
    # Its attention remembers each pass (`UnrolledAttention`), so it must not run again.
    again = settings.recompute_modules - {"core_attn"}
    config = transformer_config(spec, layout, replace(settings, recompute_modules=again), dtype)
    draft = DraftModel(spec, layout, config).to(device, dtype).requires_grad_(False)
    keep_biases_in_fp32(draft)
    fake_quantise(int4_policy(settings), draft, draft_places(draft, spec, Shard.current()))
    return draft


def draft_training(
    spec: ArchSpec, chunks: Chunks, draft: DraftModel | None, settings: TrainerSettings, dtype: torch.dtype
) -> DraftTraining:
    """`draft`, wrapped for training with an optimizer of its own. Collective: every stage makes one."""
    layout, steps = chunks.layout, max(settings.mtp_training_steps, spec.mtp_num_layers)
    config = transformer_config(spec, layout, settings, dtype)
    module = MegatronModule(config) if draft is None else draft.requires_grad_(True)
    # One layer: its state is not dealt out, nor parked in host memory.
    plain = replace(layout, options=DEFAULTS)
    (wrapped,) = wrapped_for_training([module], config, plain)
    optimizer = MasterAdam([wrapped], settings.optimizer, dtype, plain)
    return DraftTraining(
        chunks, draft, wrapped, optimizer, DraftCourse(steps, settings.mtp_loss_scaling_factor)
    )
