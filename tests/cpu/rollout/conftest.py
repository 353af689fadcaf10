"""A tiny random Mixture-of-Experts policy, an engine that serves it, and a plain forward to compare with."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from miles.arch.spec import ArchSpec, AttentionSpec, DenseMlpSpec, LayerSpec, MoeSpec, RopeSpec
from miles.models.attention import PackedAttention
from miles.models.decoder import Decoder
from miles.models.numerics import Numerics
from miles.models.routing import Router
from miles.rollout.engine import GenerateOutput, GenerateRequest, SamplingParams
from miles.rollout.native.engine import EngineSettings, NativeEngine

T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(coroutine, timeout=600))


def now(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run what never waits, inside an event loop or outside of one."""
    with pytest.raises(StopIteration):
        coroutine.send(None)


def make_spec(moe: bool = True) -> ArchSpec:
    """Odd sizes on purpose, with one dense layer between two with experts."""
    attention = AttentionSpec(
        num_heads=4, num_kv_heads=2, head_dim=8, rope=RopeSpec(1e4), qkv_bias=False, output_bias=False
    )
    experts = MoeSpec(num_experts=6, top_k=2, intermediate_size=24, norm_topk_prob=True)
    dense = DenseMlpSpec(intermediate_size=40)
    return ArchSpec(
        family="qwen3_moe" if moe else "qwen3",
        architecture="Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM",
        vocab_size=37,
        hidden_size=32,
        layers=tuple(LayerSpec(attention, experts if moe and i != 1 else dense) for i in range(3)),
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        max_position_embeddings=96,
        eos_token_ids=(2,),
        bos_token_id=1,
        dtype="fp32",
        initializer_range=0.25,
    )


def make_decoder(spec: ArchSpec, seed: int = 0) -> Decoder:
    decoder = Decoder(spec)
    decoder.init_weights(torch.Generator().manual_seed(seed))
    return decoder.requires_grad_(False)


@dataclass
class Policy:
    """A decoder with the engine and the requests that the tests are written in."""

    spec: ArchSpec
    decoder: Decoder

    @classmethod
    def random(cls, spec: ArchSpec, numerics: Numerics) -> Policy:
        decoder = make_decoder(spec)
        decoder.use_numerics(numerics)
        return cls(spec, decoder)

    def engine(self, **settings: Any) -> NativeEngine:
        engine = NativeEngine(self.spec, EngineSettings(**{"max_context_len": 64, "seed": 11, **settings}))
        now(engine.share_weights(self.decoder, version=0))
        return engine

    def packed(
        self, sequences: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> tuple[list[torch.Tensor], list[np.ndarray]]:
        """A trainer's forward: per sequence the log-probs [n - 1, V] and the routes [n - 1, Lm, k]."""
        lengths = [len(sequence) - 1 for sequence in sequences]
        tokens = torch.tensor([token for sequence in sequences for token in sequence[:-1]])
        positions = torch.cat([torch.arange(length) for length in lengths])
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        router = Router.record()
        hidden = self.decoder(tokens, positions, PackedAttention(cu_seqlens), router)
        log_probs = torch.log_softmax(self.decoder.logits(hidden) / temperature, dim=-1)
        routes = router.recorded().split(lengths) if self.spec.is_moe else [torch.empty(0)] * len(lengths)
        return list(log_probs.split(lengths)), [route.numpy() for route in routes]


@pytest.fixture(scope="session")
def policy() -> Policy:
    torch.set_num_threads(1)
    spec = make_spec()
    return Policy(spec, make_decoder(spec))


def request(
    prompt: Sequence[int], key: int = 0, group: int | None = None, **sampling: Any
) -> GenerateRequest:
    params = SamplingParams(**{"max_new_tokens": 8, **sampling})
    return GenerateRequest(input_ids=prompt, sampling=params, sample_key=key, group=group)


def prompt_groups(groups: int, size: int, seed: int = 0, **sampling: Any) -> list[list[GenerateRequest]]:
    """`groups` prompts of 3 to 9 tokens with `size` requests each, keys counted through."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 37, size=rng.integers(3, 10)).tolist() for _ in range(groups)]
    return [
        [request(prompt, key=g * size + i, group=g, **sampling) for i in range(size)]
        for g, prompt in enumerate(prompts)
    ]


def generate_all(
    engine: NativeEngine, calls: Sequence[Sequence[GenerateRequest]]
) -> list[list[GenerateOutput]]:
    """All calls in flight at once."""

    async def gather() -> list[list[GenerateOutput]]:
        return await asyncio.gather(*(engine.generate(call) for call in calls))

    return run(gather())
