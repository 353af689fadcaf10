"""`[model]`: which weights a run starts from."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from miles.config.sections.base import Section


class ModelSection(Section):
    """The checkpoints that a run reads and writes, and the type its weights are held in."""

    hf_checkpoint: str | None = None
    """Hugging Face checkpoint directory: architecture, tokenizer, weights. `builtin:sort` is made on the
    spot."""

    model_name: str | None = None
    """Name of a known architecture; only used where the checkpoint's `config.json` is silent."""

    ref_load: str | None = None
    """Checkpoint of the frozen reference policy; default: the weights the run starts from."""

    load: str | None = None
    """Checkpoint to start from: a training checkpoint (with optimizer state) or a Hugging Face directory."""

    save_hf: str | None = None
    """Also write Hugging Face checkpoints here at every save; `{rollout_id}` is replaced."""

    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Type of the weights in training and rollout; default: the checkpoint's own."""

    padded_vocab_size: PositiveInt | None = None
    """Rows of the embedding in the trainer, padding included; default: the least that tensor parallelism
    divides."""

    start_rollout_id: NonNegativeInt | None = None
    """Number of the first rollout; default: the one after the loaded checkpoint's."""
