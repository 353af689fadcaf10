"""Small checkpoints for conversions, and what is asked of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles.arch import published_tensors, spec_from_hf_config
from miles.arch.precision import FormatName, NumberFormat
from miles.weights.convert import Wanted, convert, open_source, plan_conversion
from miles.weights.convert.stored import as_numbers
from miles.weights.hf import write_hf

MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
DENSE = {key: value for key, value in MOE.items() if "expert" not in key and "moe" not in key} | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "intermediate_size": 320,
}
QUANTISED: tuple[FormatName, ...] = ("fp8", "fp8_channel", "fp8_tensor", "mxfp8", "nvfp4", "int4", "int8")
EXPERT = "model.layers.0.mlp.experts.1.up_proj.weight"


def make_checkpoint(directory: Path, config: dict[str, Any] = MOE, shard_bytes: int = 150_000) -> Path:
    """A random bf16 checkpoint with a tokenizer beside it."""
    spec = spec_from_hf_config(config)
    generator = torch.Generator().manual_seed(0)
    tensors = (
        (name, (torch.randn(shape, generator=generator) * 0.05).bfloat16())
        for name, shape in published_tensors(spec).items()
    )
    write_hf(directory, spec, tensors, max_shard_bytes=shard_bytes)
    (directory / "tokenizer.json").write_text("{}")
    return directory


def converted(
    source: Path, target: Path, to: FormatName | NumberFormat | None, **asked: Any
) -> dict[str, Any]:
    """Convert and return the manifest."""
    form = NumberFormat(to) if isinstance(to, str) else to
    return convert(plan_conversion(open_source(source), target, Wanted(form, **asked)))


def weights_of(directory: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What a checkpoint's weights stand for."""
    source = open_source(directory)
    found = {}
    for name, weight in source.weights.items():
        parts = {part: source.reader.read(entry) for part, entry in weight.parts.items()}
        found[name] = as_numbers(weight, parts, dtype)
    source.reader.close()
    return found


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
