"""On a GPU: a decode step replayed from a CUDA graph gives what the eager step does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from miles.arch.spec import ArchSpec, AttentionSpec, DenseMlpSpec, LayerSpec, MoeSpec, RopeSpec
from miles.models.decoder import Decoder
from miles.models.numerics import FAST
from miles.rollout.native.runner import Runner

DEVICE = torch.device("cuda")


def make_spec(moe: bool) -> ArchSpec:
    attention = AttentionSpec(
        num_heads=8, num_kv_heads=2, head_dim=64, rope=RopeSpec(1e4), qkv_bias=False, output_bias=False
    )
    experts = MoeSpec(num_experts=16, top_k=4, intermediate_size=128, norm_topk_prob=True)
    return ArchSpec(
        family="qwen3_moe" if moe else "qwen3",
        architecture="Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM",
        vocab_size=512,
        hidden_size=256,
        layers=(LayerSpec(attention, experts if moe else DenseMlpSpec(intermediate_size=512)),) * 4,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
        eos_token_ids=(2,),
        bos_token_id=1,
        dtype="bf16",
        initializer_range=0.05,
    )


def make_runner(decoder: Decoder, captured_requests: int) -> Runner:
    runner = Runner(
        decoder.spec, 17, 1024, decoder.embed.dtype, DEVICE, FAST, captured_requests=captured_requests
    )
    runner.decoder = decoder
    return runner


def make_decoder(spec: ArchSpec, dtype: torch.dtype) -> Decoder:
    with DEVICE:
        decoder = Decoder(spec, dtype)
    decoder.init_weights(torch.Generator("cuda").manual_seed(0))
    return decoder.requires_grad_(False)


@pytest.mark.parametrize(
    ("moe", "dtype"),
    [(False, torch.float32), (False, torch.bfloat16), (True, torch.bfloat16)],
    ids=["dense fp32", "dense bf16", "experts bf16"],
)
@torch.inference_mode()
def test_a_replayed_step_gives_what_an_eager_one_does(moe: bool, dtype: torch.dtype) -> None:
    decoder = make_decoder(make_spec(moe), dtype)
    eager, static = make_runner(decoder, 0), make_runner(decoder, 16)
    assert static.captured is not None
    if static.captured.obstacle is not None:
        pytest.skip(static.captured.obstacle)
    prompts = [[(11 * i + j) % 512 for j in range(1 + 37 * i)] for i in range(16)]
    for runner in (eager, static):
        runner.prefill(prompts, list(range(16)))
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=DEVICE)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-3
    for step, count in enumerate((16, 16, 11, 16, 5, 1, 11)):
        tokens = torch.arange(count, device=DEVICE) + step
        expected, expected_routes = eager.decode(tokens, lengths[:count] + step)
        logits, routes = static.decode(tokens, lengths[:count] + step)
        torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)
        if expected_routes is not None and routes is not None:
            # Near ties may fall otherwise: attention rounds at another place.
            assert (routes.sort(-1).values == expected_routes.sort(-1).values).float().mean() > 0.97
        # From here on both caches hold the same.
        static.cache.keys.copy_(eager.cache.keys)
        static.cache.values.copy_(eager.cache.values)
    decoder.head_weight.mul_(2)
    static.decoder = decoder
    twice = static.decode(tokens, lengths[:count] + step)[0]
    torch.testing.assert_close(twice, 2 * expected, atol=2 * tolerance, rtol=tolerance)


@torch.inference_mode()
def test_experts_that_no_graph_holds_decode_eagerly() -> None:
    spec = make_spec(moe=True)
    odd = tuple(replace(layer, mlp=replace(layer.mlp, intermediate_size=100)) for layer in spec.layers)
    static = make_runner(make_decoder(replace(spec, layers=odd), torch.bfloat16), 16)
    assert static.captured is not None and "grouped product" in (static.captured.obstacle or "")
