"""The native decoder against transformers: same weights, same logits, same gradients, in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from miles.arch import check_weights, load_spec
from miles.models.attention import PackedAttention
from miles.models.decoder import Decoder
from miles.models.routing import Router
from miles.weights.hf import read_hf, write_hf
from miles.weights.native_map import load_published, published_views, to_published

transformers = pytest.importorskip("transformers")

DENSE = {"num_hidden_layers": 2, "max_position_embeddings": 512}
MOE = {
    "architecture": "Qwen3Moe",
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "intermediate_size": 28,
}
CASES: dict[str, dict[str, Any]] = {
    "dense, biases, untied": DENSE
    | {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 44, "attention_bias": True}
    | {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 6}
    | {"rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    "moe, a dense layer, normalised gates, tied": MOE
    | {"vocab_size": 53, "hidden_size": 24, "mlp_only_layers": [1], "tie_word_embeddings": True}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    | {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "norm_topk_prob": True},
    "moe, odd widths, raw gates, every other layer dense": MOE
    | {"vocab_size": 29, "hidden_size": 18, "decoder_sparse_step": 2, "attention_bias": True}
    | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 7, "norm_topk_prob": False},
    "llama 3, no scaling, untied": DENSE
    | {"architecture": "Llama", "vocab_size": 61, "hidden_size": 36, "intermediate_size": 50}
    | {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
}
LENGTHS = (7, 1, 23, 12)


def make_reference(case: dict[str, Any]) -> nn.Module:
    """A transformers model with every parameter random, norms and biases too: a mix-up would show."""
    family = case.get("architecture", "Qwen3")
    config = getattr(transformers, f"{family}Config")(
        **{k: v for k, v in case.items() if k != "architecture"}
    )
    # transformers' grouped kernel refuses odd expert widths; its plain loop takes all.
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(config, experts_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3, generator=generator).add_(1.0 if "norm" in name else 0.0)
    return model


def load_reference(directory: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager")


def reference_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients under published names: transformers keeps a layer's experts stacked."""
    published = {}
    for name, parameter in model.named_parameters():
        prefix, _, stack = name.partition(".experts.")
        for expert, grad in enumerate(parameter.grad) if stack else ():
            named = (
                zip(("gate_proj", "up_proj"), grad.chunk(2), strict=True)
                if stack == "gate_up_proj"
                else [(stack, grad)]
            )
            published |= {f"{prefix}.experts.{expert}.{part}.weight": value for part, value in named}
        if not stack:
            published[name] = parameter.grad
    return published


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_logits_gradients_and_files_equal_transformers(case: dict[str, Any], tmp_path: Path) -> None:
    reference = make_reference(case)
    reference.save_pretrained(tmp_path / "hf")
    spec = load_spec(tmp_path / "hf")
    check_weights(spec, tmp_path / "hf")
    decoder = Decoder(spec)
    load_published(decoder, read_hf(tmp_path / "hf"))

    sequences = [
        torch.randint(spec.vocab_size, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS
    ]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    attention = PackedAttention(torch.tensor([0, *LENGTHS]).cumsum(0))
    expected = torch.cat([reference(tokens[None]).logits[0] for tokens in sequences])
    logits = decoder.logits(decoder(torch.cat(sequences), positions, attention, Router.decide()))
    assert expected.abs().max() > 1
    assert (logits - expected).abs().max() <= 1e-4

    weighting = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weighting).sum().backward()
    (logits * weighting).sum().backward()
    gradients = reference_gradients(reference)
    native = {name: parameter.grad for name, parameter in decoder.named_parameters()}
    for name, grad in published_views(spec, native):
        scale = gradients[name].abs().max()
        assert (grad - gradients[name]).abs().max() <= 1e-4 * scale, name

    write_hf(
        tmp_path / "native", spec, to_published(decoder), source_dir=tmp_path / "hf", max_shard_bytes=20_000
    )
    assert load_spec(tmp_path / "native") == spec
    again = load_reference(tmp_path / "native")
    with torch.no_grad():
        assert torch.equal(again(sequences[2][None]).logits, reference(sequences[2][None]).logits)


def test_a_config_made_by_miles_loads_in_transformers(tmp_path: Path) -> None:
    reference = make_reference(CASES["moe, a dense layer, normalised gates, tied"])
    reference.save_pretrained(tmp_path / "hf")
    spec = load_spec(tmp_path / "hf")
    write_hf(tmp_path / "native", spec, read_hf(tmp_path / "hf"))
    again = load_reference(tmp_path / "native")
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, reference(tokens).logits)


def test_bf16_logits_stay_close_to_transformers_in_bf16(tmp_path: Path) -> None:
    reference = make_reference(CASES["dense, biases, untied"]).bfloat16()
    reference.save_pretrained(tmp_path)
    spec = load_spec(tmp_path)
    assert spec.dtype == "bf16"
    decoder = Decoder(spec, torch.bfloat16)
    load_published(decoder, read_hf(tmp_path))
    tokens = torch.arange(40)
    with torch.no_grad():
        hidden = decoder(tokens, tokens, PackedAttention(torch.tensor([0, 40])), Router.decide())
        difference = (decoder.logits(hidden) - reference(tokens[None]).logits[0]).abs()
    assert hidden.dtype == torch.bfloat16
    assert difference.mean() < 0.05 * reference(tokens[None]).logits.abs().mean()
