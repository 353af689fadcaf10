"""Megatron's model: weights in and out bit for bit, and the logits of native decoder and transformers."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from miles.arch import ArchSpec, load_spec, spec_from_hf_config, with_mtp
from miles.arch.specs import shipped_spec
from miles.errors import MilesError
from miles.models.attention import PackedAttention
from miles.models.decoder import Decoder
from miles.models.routing import Router
from miles.models.softcap import softcapped
from miles.training.megatron.groups import open_groups
from miles.training.megatron.layout import Implementation, MegatronLayout, require_expressible
from miles.training.native.micro_batches import MicroBatch
from miles.training.settings import TrainerSettings
from miles.weights.hf import read_hf, write_hf
from miles.weights.native_map import load_published, published_views, to_published

BASE = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "rope_theta": 1e4,
    "initializer_range": 0.3,
}
MOE = {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 12}
CASES: dict[str, dict[str, Any]] = {
    "qwen3, tied": {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
    "qwen3, one kv head, biases": {
        "architectures": ["Qwen3ForCausalLM"],
        "num_key_value_heads": 1,
        "attention_bias": True,
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "llama 3.1, slowed rotation": {
        "architectures": ["LlamaForCausalLM"],
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
        | {"high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    },
    "moe, a dense layer, normalised gates": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    }
    | MOE,
    "moe, raw gates, tied": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
    }
    | MOE,
}
SHARED = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 10, "n_shared_experts": 2}
CASES |= {
    "glm 4.5, groups, biases, head norms": {
        "architectures": ["Glm4MoeForCausalLM"],
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
    }
    | SHARED,
    "minimax m2, norms over the width": {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "intermediate_size": 9,
        "rotary_dim": 4,
        "num_key_value_heads": 2,
    },
}
LATENT = {"kv_lora_rank": 11, "qk_nope_head_dim": 7, "qk_rope_head_dim": 6, "v_head_dim": 5}
CASES |= {
    "deepseek v3, yarn": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": 4,
        "q_lora_rank": 14,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 4.0, "beta_slow": 1.0}
        | {"original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 0.9},
    }
    | LATENT
    | SHARED,
    "deepseek v3, queries at once": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "first_k_dense_replace": 0,
    }
    | LATENT
    | SHARED,
}
CASES["deepseek v3.2, an indexer of six keys"] = CASES["deepseek v3, yarn"] | {
    "architectures": ["DeepseekV32ForCausalLM"],
    "index_topk": 6,
    "index_head_dim": 10,
    "index_n_heads": 13,
}
MADE: dict[str, dict[str, Any]] = {
    "gemma2": {},
    "gemma3_text": {},
    "gemma3": {},
    "llama4_text": {},
    "llama4": {"num_experts_per_tok": 1},
}
"""Of `tests/cpu/families/tiny_checkpoints.py`: windows or chunks of 5 or 6 tokens, two with a tower; and
what is changed of them."""
LENGTHS = (7, 1, 40, 12)


def random_decoder(spec: ArchSpec) -> Decoder:
    """Every parameter random, norms and biases too: a mix-up would show."""
    decoder = Decoder(spec)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.normal_(std=0.3, generator=generator).add_(1.0 if "norm" in name else 0.0)
    return decoder


def made(case: dict[str, Any] | str, directory: Path) -> tuple[Decoder, Any]:
    """A checkpoint, as the native decoder and transformers read it. A name: one that transformers made."""
    transformers = pytest.importorskip("transformers")
    if isinstance(case, str):
        from tests.cpu.families.tiny_checkpoints import CASES as MADE_BY_TRANSFORMERS

        given = MADE_BY_TRANSFORMERS[case]
        reference = replace(given, inside=given.inside | MADE[case]).save(directory)
        decoder = Decoder(load_spec(directory))
        load_published(decoder, read_hf(directory))
        return decoder, reference
    decoder = random_decoder(spec_from_hf_config(BASE | case))
    write_hf(directory, decoder.spec, to_published(decoder))
    return decoder, transformers.AutoModelForCausalLM.from_pretrained(
        directory, experts_implementation="eager"
    )


def packed(spec: ArchSpec) -> tuple[list[Tensor], MicroBatch]:
    sequences = [
        torch.randint(spec.vocab_size, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS
    ]
    rows = torch.arange(sum(LENGTHS))
    return sequences, MicroBatch(
        rows_T=rows.numpy(),
        packed_rows=rows.numpy(),
        tokens_T=torch.cat(sequences),
        positions_T=torch.cat([torch.arange(n) for n in LENGTHS]),
        cu_seqlens_N1=torch.tensor([0, *LENGTHS]).cumsum(0),
        shared=None,
        routes_TLK=None,
        trained_R=rows,
        trained_rows=rows.numpy(),
        targets_R=rows,
        loss_mask_R=rows,
        sequences_R=None,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("case", [*CASES.values(), *MADE], ids=[*CASES, *MADE])
def test_weights_logits_and_gradients(case: dict[str, Any] | str, tmp_path: Path) -> None:
    decoder, reference = made(case, tmp_path / "hf")
    spec, layout = decoder.spec, MegatronLayout()
    open_groups(layout, spec.num_layers)
    from miles.training.megatron.attention import micro_batch_rows
    from miles.training.megatron.model import build_chunks
    from miles.training.megatron.tensors import MegatronTensors
    from miles.training.megatron.transformer_config import transformer_config

    config = transformer_config(spec, layout, TrainerSettings(), torch.float32)
    chunks = build_chunks(spec, layout, config, torch.device("cpu"))
    tensors = MegatronTensors(spec, chunks, torch.device("cpu"))
    tensors.load(read_hf(tmp_path / "hf"), where="hf")
    gathered, given = dict(tensors.published(torch.float32)), dict(to_published(decoder))
    assert gathered.keys() == given.keys()
    assert all(torch.equal(gathered[name], given[name]) for name in given)

    sequences, micro_batch = packed(spec)
    (model,) = chunks
    model.routes.announce(None, measure=False, trains=True)
    hidden = model(micro_batch_rows(micro_batch, layout, spec)).squeeze(1)
    logits = softcapped(hidden @ model.head_weight.t(), spec.logit_softcap)
    attention = PackedAttention(micro_batch.cu_seqlens_N1)
    native = decoder.logits(
        decoder(micro_batch.tokens_T, micro_batch.positions_T, attention, Router.decide())
    )
    expected = torch.cat([reference(tokens[None]).logits[0] for tokens in sequences])
    assert expected.abs().max() > 1
    assert (logits - native).abs().max() <= 1e-4
    assert (logits - expected).abs().max() <= 1e-4

    weighting = torch.randn(native.shape, generator=torch.Generator().manual_seed(1))
    (native * weighting).sum().backward()
    (logits * weighting).sum().backward()

    def gradient(parameter: torch.nn.Parameter) -> Tensor:
        # An expert that no token visits, and a router's bias, have no gradient at all.
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    gradients = {name: gradient(parameter) for name, parameter in decoder.named_parameters()}
    theirs = dict(published_views(spec, gradients))
    for name, grad in tensors.published(torch.float32, of=gradient):
        assert (grad - theirs[name]).abs().max() <= 1e-4 * theirs[name].abs().max() + 1e-6, name


def test_weights_keep_their_bits_in_bf16(tmp_path: Path) -> None:
    """Minus zero, infinities and NaN included."""
    spec = spec_from_hf_config(BASE | CASES["moe, a dense layer, normalised gates"])
    open_groups(MegatronLayout(), spec.num_layers)
    from miles.training.megatron.model import build_chunks
    from miles.training.megatron.tensors import MegatronTensors
    from miles.training.megatron.transformer_config import transformer_config

    given = {name: view.bfloat16() for name, view in to_published(random_decoder(spec))}
    odd = torch.tensor([-0.0, float("inf"), float("nan"), 1e-40]).bfloat16()
    for tensor in given.values():
        tensor.view(-1)[:4] = odd
    config = transformer_config(spec, MegatronLayout(), TrainerSettings(), torch.bfloat16)
    chunks = build_chunks(spec, MegatronLayout(), config, torch.device("cpu"))
    tensors = MegatronTensors(spec, chunks, torch.device("cpu"))
    tensors.load(given.items(), where="here")
    for name, tensor in tensors.published(torch.bfloat16):
        assert torch.equal(tensor.view(torch.int16), given[name].view(torch.int16)), name


def test_mtp_layers_of_another_kind_than_the_last_layer_are_refused_by_name() -> None:
    spec = with_mtp(spec_from_hf_config(BASE | CASES["moe, a dense layer, normalised gates"]), 1)
    assert spec.mtp is not None
    require_expressible(spec)
    odd = replace(spec, mtp=replace(spec.mtp, layers=(spec.layers[1],)))
    with pytest.raises(MilesError, match="does not carry MTP layers of another kind"):
        require_expressible(odd)


@pytest.mark.parametrize(
    ("model", "implementation", "what"),
    [
        ("llama-4-scout-17b-16e", "transformer_engine", "chunked attention in Transformer Engine's layers"),
        ("llama-4-scout-17b-16e", "local", ""),
        ("gemma-3n-e4b", "local", "a model of the family gemma3n"),
        ("deepseek-v3.2", "local", ""),
        ("deepseek-v3.2", "transformer_engine", ""),
        ("gemma-2-9b", "transformer_engine", "soft-capped attention in Transformer Engine's layers"),
        ("gemma-2-9b", "local", ""),
        ("gemma-3-12b", "transformer_engine", ""),
    ],
)
def test_what_is_not_carried_is_named(model: str, implementation: Implementation, what: str) -> None:
    expected = pytest.raises(MilesError, match=f"does not carry {what}") if what else nullcontext()
    with expected:
        require_expressible(shipped_spec(model), MegatronLayout(implementation=implementation))


def test_an_indexer_is_not_shared_over_context_parallel_ranks() -> None:
    require_expressible(shipped_spec("deepseek-v3"), MegatronLayout(cp=2))
    with pytest.raises(MilesError, match="does not carry an indexer over context-parallel ranks"):
        require_expressible(shipped_spec("deepseek-v3.2"), MegatronLayout(cp=2))


def test_a_dense_model_computes_as_ever_where_preflight_refuses_fp8() -> None:
    """PRC6: without Transformer Engine nothing is rounded, and nothing is said."""
    spec = spec_from_hf_config(BASE | CASES["qwen2"])
    open_groups(MegatronLayout(), spec.num_layers)
    from miles.training.megatron.attention import micro_batch_rows
    from miles.training.megatron.model import build_chunks
    from miles.training.megatron.tensors import MegatronTensors
    from miles.training.megatron.transformer_config import transformer_config

    published = dict(to_published(random_decoder(spec)))
    outputs = []
    for fp8 in (None, "e4m3"):
        config = transformer_config(spec, MegatronLayout(), TrainerSettings(), torch.float32)
        config.fp8 = fp8
        (model,) = build_chunks(spec, MegatronLayout(), config, torch.device("cpu"))
        MegatronTensors(spec, [model], torch.device("cpu")).load(published.items(), where="here")
        outputs.append(model(micro_batch_rows(packed(spec)[1], MegatronLayout(), spec)))
    assert torch.equal(*outputs)


@pytest.mark.slow
def test_only_megatron_core_sees_a_replaced_torch_and_none_with_a_gpu() -> None:
    script = """if True:
        import torch
        import miles.training.megatron.cpu as cpu
        from miles.training.megatron.groups import open_groups
        from miles.training.megatron.layout import MegatronLayout
        real, torch.cuda.is_available = torch.cuda.is_available, lambda: True
        cpu.install()
        assert torch.zeros(1).type() == "torch.FloatTensor"
        torch.cuda.is_available = real
        seen = lambda: [torch.zeros, torch.tensor, torch.cuda.Stream, torch.cuda.synchronize]
        before = seen()
        open_groups(MegatronLayout(), 2)
        assert seen() == before
        from megatron.core.optimizer import optimizer
        assert optimizer.torch.zeros(1, device="cuda").device == cpu.CPU
        assert optimizer.torch.zeros(1).type() == "torch.cuda.FloatTensor"
    """
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
