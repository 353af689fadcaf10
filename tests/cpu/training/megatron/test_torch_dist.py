"""`miles convert` to Megatron's torch_dist and back: bit for bit, by megatron-core itself."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import preloaded
import pytest
import torch
from e2e_support import PATIENCE_S
from preloaded import MEGATRON

from miles.arch import load_spec, spec_from_hf_config
from miles.models.decoder import Decoder
from miles.training.megatron.torch_dist import write_description
from miles.weights.hf import read_hf, write_hf
from miles.weights.native_map import to_published

pytestmark = pytest.mark.slow

SIZES = {"vocab_size": 53, "hidden_size": 24, "intermediate_size": 28, "num_attention_heads": 4}
MOE = {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "mlp_only_layers": [1]}


def checkpoint(directory: Path, **config: Any) -> Path:
    """bf16, every number random, with the numbers that arithmetic would change."""
    spec = spec_from_hf_config(
        SIZES
        | {"num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 3, "torch_dtype": "bfloat16"}
        | {"rope_theta": 1e4, "max_position_embeddings": 64}
        | config
    )
    decoder = Decoder(spec)
    decoder.init_weights(torch.Generator().manual_seed(0))
    tensors = {name: view.bfloat16() for name, view in to_published(decoder)}
    for tensor in tensors.values():
        tensor.view(-1)[:3] = torch.tensor([-0.0, float("inf"), 1e-40]).bfloat16()
    write_hf(directory, spec, tensors.items())
    return directory


def miles(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    words = ("convert", *map(str, arguments))
    process = preloaded.miles(words, os.environ | {"OMP_NUM_THREADS": "1"}, imported=MEGATRON)
    out, err = process.communicate(timeout=PATIENCE_S)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def test_there_and_back(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "hf", architectures=["Qwen3MoeForCausalLM"], **MOE)
    there = miles(source, tmp_path / "torch_dist", "--to", "torch_dist")
    assert there.returncode == 0, there.stderr
    assert {".metadata", "common.pt", "config.json"} <= {p.name for p in (tmp_path / "torch_dist").iterdir()}
    back = miles(tmp_path / "torch_dist", tmp_path / "back")
    assert back.returncode == 0, back.stderr
    given, found = dict(read_hf(source)), dict(read_hf(tmp_path / "back"))
    assert given.keys() == found.keys()
    for name, tensor in given.items():
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name
    assert load_spec(tmp_path / "back") == load_spec(source)


def test_a_description_is_of_plain_weights(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "hf", architectures=["Qwen3ForCausalLM"])
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    write_description(tmp_path, load_spec(source), torch.bfloat16, source)
    assert json.loads((tmp_path / "config.json").read_text()) == config


def test_what_has_no_effect_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "hf", architectures=["Qwen3ForCausalLM"])
    refused = miles(source, tmp_path / "out", "--to", "torch_dist", "--group-size", "32")
    assert refused.returncode == 2 and "copied as they are" in refused.stderr
    assert not (tmp_path / "out").exists()
